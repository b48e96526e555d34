r"""A tiktoken encoder for a byte-level BPE of `tokenizers`: proved to give the same ids, or refused with the reason.

Both split a text by a regular expression and merge bytes within each piece. Four things have to be equal.

*What is split.* Without a normalizer the text itself. NFC and its kin leave ASCII alone; other texts go through the
tokenizer's own normalizer. A text that holds an added token (`<|endoftext|>`) is left to `tokenizers`.

*Where it is split.* Only patterns made of constructs that mean the same in Oniguruma (tokenizers) and fancy-regex
(tiktoken) are taken: no anchors, no look-behind, no `{1,3}+` (a loop there, possessive here). Such a pattern looks at a
character through its classes alone (`\p{L}`, `[^\r\n\p{L}\p{N}]`, `(?i:s)`), so it splits alike if the engines, whose
Unicode versions may differ, agree which characters are in each class. That is compared for every character met.

*How a piece is merged.* tokenizers merges the listed pair of lowest index, leftmost first; tiktoken *any* pair whose
concatenation is in its table, that of lowest rank, leftmost first. Take a token t and the state [x, y], x + y = t, at
some place of some piece. No merge so far crossed the borders of t, and one inside of them does not depend on what is
outside: the same merges, in the same order, led from t's own bytes to [x, y]. So what t's own bytes are merged to, with
whole-piece look-up (`ignore_merges`) off, tells all about t; it is computed for every token of the vocabulary.
  [t]: [x, y] is the last state before it, hence (x, y) the one merge that ever makes t, and a listed one. With ranks in
    the order of merges both libraries do it at the same moment. (Ranks in the order of ids would be wrong.)
  something else, no look-up: t is never made, and left out of the table.
  something else, look-up: t is only ever found as a whole piece, as tiktoken also looks first. With three parts or more
    [x, y] never comes up, and t gets one of the highest ranks. With two parts tiktoken would merge them: refused.
A token with several listed merges (Llama 3: all of its splits) has one that is ever used. Where they stand together it
does not matter which; else it is refused.

*Nothing is lost.* tokenizers keeps what no match covers, tiktoken drops it: the encoder counts bytes.

What is left to believe is that two regular expression engines do what they document. Beside the proof, both encoders
are therefore compared on nasty strings and on the user's own text before the fast one is chosen (encode.py).
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

# What ByteLevel(use_regex=true) splits by, and the same for tiktoken in OpenAI's own faster words: at a stretch of white
# space both take all of it at the end of the text, else all but its last character, or that one if it is alone.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_PATTERN_FASTER = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The constructs that Oniguruma and fancy-regex share.
_ESCAPE = r"\\[pP]\{\^?\w+\}|\\[sSdDrnt]|\\[^\w\s]"
_WORDS = re.compile(
    rf"""(?P<open>\(\?(?:i:|:|!|=)|\((?!\?))|(?P<close>\))
    |(?P<glue>\||(?:[?*+][?+]?|\{{\d+(?:,\d*)?\}})(?![?*+{{]))
    |(?P<atom>{_ESCAPE}|\[\^?(?:{_ESCAPE}|(?!&&|--|~~)[^\[\]\\])+\]|[^\\\[\](){{}}?*+|.^$])""",
    re.VERBOSE,
)
_FOLDED = re.compile(r"[\x00-\x7f]|\[[A-Za-z]+\]")  # what may stand in (?i:...)
_LIGATURES = re.compile("s[st]|f[fil]", re.IGNORECASE)  # two letters that Oniguruma also finds in one, as in ß and ﬁ


class RefusedError(Exception):
    """There is no tiktoken encoder that is known to give the same ids."""


@dataclass(frozen=True)
class FastBPE:
    """All that a worker needs for tiktoken. Ranks count from 0; tokens of the model have ids."""

    pattern: str
    classes: tuple[str, ...]  # of characters, through which the pattern sees a text
    tokens: list[bytes]  # in the order of ranks
    ids: np.ndarray  # (n_ranks,) rank to id
    normalizes: bool
    added: tuple[str, ...]  # texts that hold one of these are for tokenizers

    def encoding(self) -> Any:
        """The tiktoken encoder, from text to ranks."""
        return _encoding(self.pattern, self.tokens)

    def added_starts(self) -> list[str]:
        """A few strings, one of which starts each added token: a text with none of them needs no closer look."""
        groups: dict[str, list[str]] = {}
        for content in self.added:
            groups.setdefault(content[:2], []).append(content)
        return [os.path.commonprefix(group) for group in groups.values()]  # noqa: RUF071 (of strings, not of paths)


class CharacterClasses:
    """The classes of a pattern, as each of the two engines sees them."""

    def __init__(self, classes: Iterable[str]) -> None:
        from tokenizers import Regex, pre_tokenizers

        single = [bytes([byte]) for byte in range(256)]
        # what keeps the members alone (tiktoken drops what no match covers), and what removes them alone (tokenizers)
        self._pairs = [(_encoding(one, single), pre_tokenizers.Split(Regex(one), "removed")) for one in classes]

    def disagreeing(self, characters: str) -> set[str]:
        """Those that are in a class for one engine and not for the other."""
        different: set[str] = set()
        for keeps, removes in self._pairs:
            kept = keeps.encode_to_numpy(characters, disallowed_special=()).astype(np.uint8).tobytes().decode()
            left = "".join(stretch for stretch, _ in removes.pre_tokenize_str(characters))
            different |= set(kept) ^ (set(characters) - set(left))
        return different


def fast_bpe(settings: dict[str, Any], dtype: np.dtype[Any]) -> FastBPE:
    """The tiktoken counterpart of a `tokenizers` JSON, or RefusedError."""
    _check_model(settings["model"])
    pattern = _pattern(settings["pre_tokenizer"])
    classes = tuple(_classes(pattern))
    normalizer = _normalizer(settings["normalizer"])
    contents = [token["content"] for token in settings["added_tokens"] if token["content"]]
    ordered = _in_order_of_ranks(settings, contents)
    vocab, latin_1 = settings["model"]["vocab"], str.maketrans({char: chr(byte) for char, byte in _alphabet().items()})
    tokens = [token.translate(latin_1).encode("latin-1") for token in ordered]
    ids = np.array([vocab[token] for token in ordered], dtype=dtype)
    added = tuple(sorted({*contents, *map(normalizer.normalize_str, contents)} if normalizer else contents))
    faster = GPT2_PATTERN_FASTER if pattern == GPT2_PATTERN else pattern
    fast = FastBPE(faster, classes, tokens, ids, normalizer is not None, added)
    try:
        fast.encoding()
        ascii_different = CharacterClasses(classes).disagreeing("".join(map(chr, range(128))))
    except Exception as error:
        raise RefusedError(
            f"one of the libraries does not take the pattern: {' '.join(str(error).split())[:200]}"
        ) from None
    if ascii_different:
        raise RefusedError(f"the pattern has another meaning there for {sorted(ascii_different)}")
    return fast


def _encoding(pattern: str, tokens: list[bytes]) -> Any:
    from tiktoken import Encoding

    ranks = {token: rank for rank, token in enumerate(tokens)}
    return Encoding("clm-dist", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it prints, the next free one from U+0100 on where not."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _check_model(model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise RefusedError(f"its model is {model['type']}, not BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise RefusedError(f"its BPE has {setting}={model[setting]!r}")
    missing = len(_alphabet().keys() - model["vocab"].keys())
    if missing:
        raise RefusedError(f"its BPE is not byte-level: {missing} of the 256 bytes are not in the vocabulary")


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression that matches pieces."""
    parts = _parts(pre_tokenizer, "pretokenizers")
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise RefusedError(f"the pre-tokenizer {_names(parts)} has no tiktoken counterpart")
    if parts[-1]["add_prefix_space"]:
        raise RefusedError("tiktoken adds no space before a text (add_prefix_space)")
    if len(parts) == 1 and parts[0]["use_regex"]:
        return GPT2_PATTERN
    if len(parts) == 2 and parts[0]["type"] == "Split" and not parts[1]["use_regex"]:
        split = parts[0]
        if "Regex" in split["pattern"] and split["behavior"] == "Isolated" and not split["invert"]:
            return str(split["pattern"]["Regex"])
    raise RefusedError(f"the pre-tokenizer {_names(parts)}, as it is set, has no tiktoken counterpart")


def _parts(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a Sequence, of Sequences in it too; a list of one for anything else."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for member in part[key] for inner in _parts(member, key)]
    return [part]


def _names(parts: list[dict[str, Any]]) -> str:
    return " + ".join(part["type"] for part in parts) or "(none)"


def _normalizer(settings: dict[str, Any] | None) -> Any:
    """One that leaves ASCII as it is, or none."""
    import json

    from tokenizers import Tokenizer, models

    parts = _parts(settings, "normalizers")
    if not all(part["type"] in ("NFC", "NFD", "NFKC", "NFKD") for part in parts):
        raise RefusedError(f"the normalizer {_names(parts)} may change any text")
    if not parts:
        return None
    empty = json.loads(Tokenizer(models.BPE()).to_str())
    return Tokenizer.from_str(json.dumps({**empty, "normalizer": settings})).normalizer


def _classes(pattern: str) -> list[str]:
    """The classes of characters in a pattern that is made of what both engines understand alike."""
    found: dict[str, None] = {}
    folds = [False]  # for each open group: is it in (?i:...)?
    position = 0
    while position < len(pattern):
        word = _WORDS.match(pattern, position)
        if word is None or (word["close"] and len(folds) == 1):
            raise RefusedError(
                f"the regular expression engines may differ on {pattern[position:][:20]!r} of the pattern"
            )
        if word["open"]:
            folds.append(folds[-1] or word["open"] == "(?i:")
        elif word["close"]:
            folds.pop()
        elif word["atom"]:
            if folds[-1] and (not _FOLDED.fullmatch(word["atom"]) or _LIGATURES.search(pattern)):
                raise RefusedError(f"the engines may ignore case differently in {pattern[:60]!r}")
            if len(word["atom"]) > 1 or word["atom"].isalpha():  # else a sign that stands for itself
                found[f"(?i:{word['atom']})" if folds[-1] else word["atom"]] = None
        position = word.end()
    return list(found)


def _in_order_of_ranks(settings: dict[str, Any], added: list[str]) -> list[str]:
    """Bytes, tokens in the order of the merges that make them, tokens that are only looked up."""
    from tokenizers import models

    model, alphabet = settings["model"], _alphabet()
    known = set(alphabet)
    tokens = [token for token in model["vocab"] if known.issuperset(token)]  # the others are added tokens
    merges = [tuple(merge) for merge in model["merges"]]
    merging = models.BPE(model["vocab"], merges)  # no look-up, no splitting: what merges alone do
    parts = {token: len(merging.tokenize(token)) for token in tokens}

    made: dict[str, None] = {}
    latest = ""
    for left, right in merges:
        token = left + right
        # a merge of what is never made is never used
        if parts.get(token) == parts.get(left) == parts.get(right) == 1 and token != latest:
            if token in made:
                raise RefusedError(f"merges that make {token!r} stand apart from one another")
            made[token] = None
            latest = token
    unseen = set(filter(str.isascii, added))  # texts with these are not for tiktoken
    looked_up = [token for token in tokens if parts[token] > 1 and token not in unseen]
    if not model["ignore_merges"]:
        return [*alphabet, *made]
    for token in looked_up:
        if parts[token] == 2:
            raise RefusedError(f"tiktoken would merge two tokens to {token!r}, which no merge of the tokenizer makes")
    return [*alphabet, *made, *looked_up]
