"""Text to ids, as fast as can be had with the very ids of the tokenizer: three encoders and the choice between them.

What the user's tokenizer gives, `tokenizer(text, add_special_tokens=False)["input_ids"]`, is right by definition. The
Rust tokenizer inside it and tiktoken are used where they are shown to give the same. A choice is made once, and sent to
the worker processes, which import what they need for it and nothing else.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clm_dist.preparation.fast_bpe import CharacterClasses, FastBPE, RefusedError, fast_bpe
from clm_dist.preparation.nasty import nasty_texts

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


@dataclass(frozen=True)
class Choice:
    """An encoder to be built in another process, and why it was chosen."""

    name: str  # tiktoken | tokenizers | transformers
    reason: str
    dtype: np.dtype[Any]
    backend: str = ""  # of the first two: the JSON of `tokenizers`
    encode_special_tokens: bool = False  # not in that JSON: added special tokens are split like any text
    fast: FastBPE | None = None  # of tiktoken
    tokenizer: Any = None  # of transformers: the object itself

    def build(self) -> Encoder:
        """To be called once in a process. One thread each: there is a process for every core."""
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self.name == "transformers":
            return TransformersEncoder(self.tokenizer, self.dtype)
        exact = TokenizersEncoder(self.backend, self.encode_special_tokens, self.dtype)
        return TiktokenEncoder(self.fast, exact) if self.fast else exact


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
            different = self._classes.disagreeing("".join(map(chr, new)))
            self._same[new] = [-1 if chr(point) in different else 1 for point in new]
            same = self._same[points]
        return same


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


def choose(tokenizer: Any, sample: Sequence[str]) -> Choice:
    """The fastest encoder that gives the ids of a transformers tokenizer; `sample` is of the text it will be used on."""
    from clm_dist.data.tokenize import ids_dtype, vocab_size

    dtype = ids_dtype(vocab_size(tokenizer))
    python = TransformersEncoder(tokenizer, dtype)

    def slowest(why: str) -> Choice:
        return Choice("transformers", f"transformers, because {why}", dtype, tokenizer=tokenizer)

    if not getattr(tokenizer, "is_fast", False):
        return slowest(f"{type(tokenizer).__name__} is written in Python")
    backend = tokenizer.backend_tokenizer.to_str()
    exact = TokenizersEncoder(backend, bool(getattr(tokenizer, "split_special_tokens", False)), dtype)
    settings = {"dtype": dtype, "backend": backend, "encode_special_tokens": exact.tokenizer.encode_special_tokens}
    texts, expected = encoded(python, [*nasty_texts(tokenizer.get_added_vocab()), *sample])
    try:
        fast = fast_bpe(json.loads(backend), dtype)
        compared = compare(TiktokenEncoder(fast, exact), texts, expected)
    except RefusedError as error:
        differs = first_difference(texts, expected, exact.encode(texts))
        if differs is not None:
            return slowest(f"{type(tokenizer).__name__} does more than its Rust part, e.g. for {differs[:40]!r}")
        return Choice("tokenizers", f"tokenizers, because {error}", **settings)
    reason = f"tiktoken, proved to give the ids of tokenizers, and compared on {compared:,} texts"
    return Choice("tiktoken", reason, **settings, fast=fast)


def encoded(encoder: Encoder, texts: Sequence[str]) -> tuple[Sequence[str], tuple[np.ndarray, np.ndarray]]:
    """The texts that a tokenizer takes, encoded. One without an unknown token fails on signs the user may not have."""

    def fails(text: str) -> bool:
        try:
            encoder.encode([text])
        except Exception:
            return True
        return False

    try:
        return texts, encoder.encode(texts)
    except Exception:
        texts = [text for text in texts if not fails(text)]
        return texts, encoder.encode(texts)


def compare(encoder: TiktokenEncoder, texts: Sequence[str], expected: tuple[np.ndarray, np.ndarray]) -> int:
    """On how many of the texts tiktoken itself gives what is expected; RefusedError if there is another it would take."""
    normal = encoder.normalized(texts)
    fits = encoder.fits(texts, normal)
    taken = [text for text, fit in zip(normal, fits, strict=True) if fit]
    others = [text for text, fit in zip(texts, fits, strict=True) if not fit]
    try:
        got = encoder.raw(taken)
    except ValueError as error:
        raise RefusedError(f"tiktoken cannot be used: {error}") from None
    for some, which, found in ((taken, fits, got), (others, ~fits, encoder.exact.encode(others))):
        ids, lengths = expected[0][np.repeat(which, expected[1])], expected[1][which]
        differs = first_difference(some, (ids, lengths), found)
        if differs is not None:
            raise RefusedError(f"tiktoken gives other ids, e.g. for {differs[:40]!r}")
    return len(taken)


def first_difference(
    texts: Sequence[str], one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> str | None:
    """The first of the texts whose ids are not the same."""
    if np.array_equal(one[1], other[1]) and np.array_equal(one[0], other[0]):
        return None
    ends = zip(np.cumsum(one[1]), np.cumsum(other[1]), strict=True)
    for text, size, size_2, (end, end_2) in zip(texts, one[1], other[1], ends, strict=True):
        if not np.array_equal(one[0][end - size : end], other[0][end_2 - size_2 : end_2]):
            return text
    raise AssertionError("ids differ as a whole and nowhere")
