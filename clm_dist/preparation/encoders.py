"""Text to ids: encoders that give the very ids of the tokenizer, each faster than the one before."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from clm_dist.preparation.fast_bpe import CharacterClasses, FastBPE

# A document with a longer run of one kind is for tokenizers: tiktoken's regular expressions give up at some 10^5 spaces,
# and its merging, three times faster on words, is hardly faster there (150 to 300 against 220 to 270 ns a character).
LONG_RUN = 10_000

BATCH = 64  # texts at a time: `tokenizers` and `transformers` hold some 100 bytes a token meanwhile


class Encoder(Protocol):
    """What turns texts into ids."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids of all texts, one after another (n_tokens,); how many each text has (n_texts,) int64.

        ids are of the vocabulary's smallest unsigned type. No special tokens are added. A text with lone surrogates,
        which no file can hold, is a UnicodeEncodeError.
        """


class TransformersEncoder:
    """The tokenizer as the user has it."""

    def __init__(self, tokenizer: Any, dtype: np.dtype[Any]) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        check_encodable(texts)
        batches = (list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return joined((ids for batch in batches for ids in self.tokenizer(batch, **options)["input_ids"]), self.dtype)


class TokenizersEncoder:
    """The Rust tokenizer alone, without the Python around it."""

    def __init__(self, backend: str, encode_special_tokens: bool, dtype: np.dtype[Any]) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.dtype = Tokenizer.from_str(backend), dtype
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = encode_special_tokens

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        check_encodable(texts)
        batches = (list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
        encode = self.tokenizer.encode_batch_fast
        return joined(
            (encoding.ids for batch in batches for encoding in encode(batch, add_special_tokens=False)), self.dtype
        )


class TiktokenEncoder:
    """tiktoken for almost every text, and `tokenizers` for those outside of what fast_bpe.py proves."""

    def __init__(self, fast: FastBPE, exact: TokenizersEncoder) -> None:
        self.fast, self.exact = fast, exact
        self._encoding, self._starts = fast.encoding(), fast.added_starts()
        self._classes = CharacterClasses(fast.classes)
        self._bytes_of = np.array([len(token) for token in fast.tokens], dtype=np.int64)  # (n_ranks,)
        self._same = np.zeros(0x110000, dtype=np.int8)  # (code points,) 1: both engines see it alike, -1: not, 0: unmet
        self._same[:128] = 1  # or there would be no FastBPE

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        check_encodable(texts)
        normal = self.normalized(texts)
        fits = self.fits(texts, normal)
        proved = [text for text, fit in zip(normal, fits, strict=True) if fit]
        try:
            fast_ids, fast_lengths = self.raw(proved)
        except ValueError:
            return self.exact.encode(texts)
        if len(proved) == len(texts):
            return fast_ids, fast_lengths
        others = [text for text, fit in zip(texts, fits, strict=True) if not fit]
        return interleaved(fits, (fast_ids, fast_lengths), self.exact.encode(others))

    def normalized(self, texts: Sequence[str]) -> Sequence[str]:
        if not self.fast.normalizes:
            return texts
        normalize = self.exact.tokenizer.normalizer.normalize_str
        return [text if text.isascii() else normalize(text) for text in texts]

    def fits(self, texts: Sequence[str], normal: Sequence[str]) -> np.ndarray:
        """(n_texts,) bool: those for which the proof holds."""
        fits = np.ones(len(texts), dtype=bool)
        for some in (texts, normal) if self.fast.normalizes else (texts,):
            if self._added_in("\n".join(some), starts_only=True):
                fits &= np.array([not self._added_in(text) for text in some])
        fits &= np.array([len(text) <= LONG_RUN or not has_long_run(text) for text in normal], dtype=bool)
        beyond_ascii = [number for number, text in enumerate(normal) if not text.isascii()]
        if beyond_ascii and (self._met("".join(normal[number] for number in beyond_ascii)) < 0).any():
            fits[beyond_ascii] &= [bool((self._met(normal[number]) > 0).all()) for number in beyond_ascii]
        return fits

    def raw(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What tiktoken gives; ValueError where its regular expressions give up, or what it gives is not all of the text."""
        encode = self._encoding.encode_to_numpy
        try:
            parts = [encode(text, disallowed_special=()) for text in texts]
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of pyo3, which has no public name
                raise ValueError(str(error)) from None
            raise
        ranks = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
        if self._bytes_of[ranks].sum() != sum(len(text) if text.isascii() else len(text.encode()) for text in texts):
            raise ValueError("the pattern does not match all of the text")
        return self.fast.ids[ranks], np.array([len(part) for part in parts], dtype=np.int64)

    def _added_in(self, text: str, starts_only: bool = False) -> bool:
        if not any(start in text for start in self._starts):
            return False
        return starts_only or any(content in text for content in self.fast.added)

    def _met(self, text: str) -> np.ndarray:
        """(characters,) int8, how the engines see each; those not met before are compared now."""
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        same = self._same[points]
        if not same.all():
            new = np.unique(points[same == 0])
            different = self._disagreeing("".join(map(chr, new)))
            self._same[new] = [-1 if chr(point) in different else 1 for point in new]
            same = self._same[points]
        return same

    def _disagreeing(self, characters: str) -> set[str]:
        return self._classes.disagreeing(characters)


class FastokensEncoder(TiktokenEncoder):
    """fastokens for the texts that tiktoken is proved for. It is not proved itself: every CHECKED_EVERY-th text is done by
    tiktoken too, and any difference ends the work."""

    def __init__(self, fast: FastBPE, exact: TokenizersEncoder, backend: str, checked_every: int) -> None:
        from fastokens import Tokenizer

        super().__init__(fast, exact)
        self._fastokens, self._checked_every = Tokenizer.from_json_str(backend), checked_every
        self._fastokens.no_truncation()
        self._fastokens.no_padding()

    def raw(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What fastokens gives; DifferentIdsError where tiktoken gives something else."""
        ids, lengths = self._unchecked(texts)
        checked = texts[:: self._checked_every]
        if not checked:
            return ids, lengths
        expected = super().raw(checked)
        ends = np.cumsum(lengths)[:: self._checked_every]
        starts = ends - lengths[:: self._checked_every]
        found = np.concatenate([ids[begin:end] for begin, end in zip(starts, ends, strict=True)])
        if not (np.array_equal(lengths[:: self._checked_every], expected[1]) and np.array_equal(found, expected[0])):
            raise DifferentIdsError(f"for one of {len(checked)} texts, the first of which begins {checked[0][:40]!r}")
        return ids, lengths

    def _unchecked(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self._fastokens.encode_batch_flat(list(texts), add_special_tokens=False)
        except Exception as error:  # as tiktoken does where its regular expressions give up: for `tokenizers`
            raise ValueError(str(error)) from None
        lengths = np.diff(np.frombuffer(offsets, dtype=np.uint64)).astype(np.int64)
        return np.frombuffer(ids, dtype=np.uint32).astype(self.exact.dtype), lengths

    def _disagreeing(self, characters: str) -> set[str]:
        """The same in contexts, since its pattern cannot be asked for classes."""
        different = super()._disagreeing(characters)
        contexts = [
            f"a{one}a 1{one}1 {one} {one}{one}'{one}s\n{one}\n{one}." for one in characters if one not in different
        ]
        ours, expected = self._unchecked(contexts), super().raw(contexts)
        if np.array_equal(ours[1], expected[1]) and np.array_equal(ours[0], expected[0]):
            return different
        pairs = zip(*(np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (ours, expected)), strict=True)
        same = [np.array_equal(one, other) for one, other in pairs]
        known = [one for one in characters if one not in different]
        return different | {one for one, equal in zip(known, same, strict=True) if not equal}


class DifferentIdsError(Exception):
    """fastokens and tiktoken do not agree on a text."""


def check_encodable(texts: Sequence[str]) -> None:
    """UnicodeEncodeError for lone surrogates; the libraries replace them, or name another reason."""
    "".join(texts).encode("utf-8")


def has_long_run(text: str) -> bool:
    """Over LONG_RUN characters without white space, or of white space beside one after each word. At the speed of C."""
    words = text.split()
    lengths = [len(word) for word in words]
    return max(lengths, default=0) > LONG_RUN or len(text) - sum(lengths) - len(words) > LONG_RUN


def joined(parts: Iterable[list[int]], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids to one array and the lengths."""
    arrays = [np.array(part, dtype=dtype) for part in parts]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype), lengths


def interleaved(
    first: np.ndarray, ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Encoded texts in their order again, `ours` where `first` (n_texts,) is true."""
    lengths = np.empty(len(first), dtype=np.int64)
    lengths[first], lengths[~first] = ours[1], theirs[1]
    of_token = np.repeat(first, lengths)
    ids = np.empty(len(of_token), dtype=ours[0].dtype)
    ids[of_token], ids[~of_token] = ours[0], theirs[0]
    return ids, lengths
