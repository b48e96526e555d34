"""The choice of an encoder: the fastest that gives the ids of the tokenizer.

What the user's tokenizer gives, `tokenizer(text, add_special_tokens=False)["input_ids"]`, is right by definition. Other
encoders are used where they are shown to give the same. A choice is made once, and sent to the worker processes, which
import what they need for it and nothing else.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clm_dist.errors import UserError
from clm_dist.preparation.encoders import (
    Encoder,
    FastokensEncoder,
    TiktokenEncoder,
    TokenizersEncoder,
    TransformersEncoder,
)
from clm_dist.preparation.fast_bpe import FastBPE, RefusedError, fast_bpe
from clm_dist.preparation.nasty import nasty_texts

ENCODERS = ("fastokens", "tiktoken", "tokenizers", "transformers")  # the fastest first
CHECKED_EVERY = 64  # texts: so many of fastokens' are compared with tiktoken's while the work goes on


@dataclass(frozen=True)
class Choice:
    """An encoder to be built in another process, and why it was chosen."""

    name: str  # fastokens | tiktoken | tokenizers | transformers
    reason: str
    dtype: np.dtype[Any]
    backend: str = ""  # of all but the last: the JSON of `tokenizers`
    encode_special_tokens: bool = False  # not in that JSON: added special tokens are split like any text
    fast: FastBPE | None = None  # of the first two
    tokenizer: Any = None  # of transformers: the object itself

    def build(self) -> Encoder:
        """To be called once in a process. One thread each: there is a process for every core."""
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self.name == "transformers":
            return TransformersEncoder(self.tokenizer, self.dtype)
        exact = TokenizersEncoder(self.backend, self.encode_special_tokens, self.dtype)
        if self.name == "fastokens" and self.fast:
            return FastokensEncoder(self.fast, exact, self.backend, CHECKED_EVERY)
        return TiktokenEncoder(self.fast, exact) if self.fast else exact


def choose(tokenizer: Any, sample: Sequence[str], wanted: str | None = None) -> Choice:
    """The fastest encoder that gives the ids of a transformers tokenizer; `sample` is of the text it will be used on.

    wanted: one of ENCODERS, or None for the fastest; UserError where that one does not give them.
    """
    from clm_dist.data.tokenize import ids_dtype, vocab_size

    dtype = ids_dtype(vocab_size(tokenizer))
    python = TransformersEncoder(tokenizer, dtype)

    def no_faster(name: str, why: str) -> Choice:
        if wanted not in (None, name) and ENCODERS.index(str(wanted)) < ENCODERS.index(name):
            raise UserError(f"--encoder {wanted} cannot be used, because {why}; leave --encoder out")
        return Choice(name, f"{name}, because {why}", dtype)

    if wanted == "transformers" or not getattr(tokenizer, "is_fast", False):
        why = "--encoder says so" if wanted == "transformers" else f"{type(tokenizer).__name__} is written in Python"
        return replace(no_faster("transformers", why), tokenizer=tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    exact = TokenizersEncoder(backend, bool(getattr(tokenizer, "split_special_tokens", False)), dtype)
    settings: dict[str, Any] = {"backend": backend, "encode_special_tokens": exact.tokenizer.encode_special_tokens}
    texts, expected = encoded(python, [*nasty_texts(tokenizer.get_added_vocab()), *sample])
    try:
        if wanted == "tokenizers":
            raise RefusedError("--encoder says so")
        settings["fast"] = fast = fast_bpe(json.loads(backend), dtype)
        why_not = "not asked for"
        if wanted != "tiktoken":
            why_not = fastokens_differs(fast, exact, backend, texts, expected)
            if not why_not:
                how = f"compared with tokenizers on {len(texts):,} texts, and with tiktoken on every {CHECKED_EVERY}th"
                return Choice("fastokens", f"fastokens, {how}", dtype, **settings)
        compared = compare(TiktokenEncoder(fast, exact), texts, expected)
    except RefusedError as error:
        differs = first_difference(texts, expected, exact.encode(texts))
        if differs is not None:
            why = f"{type(tokenizer).__name__} does more than its Rust part, e.g. for {differs[:40]!r}"
            return replace(no_faster("transformers", why), tokenizer=tokenizer)
        settings.pop("fast", None)
        return replace(no_faster("tokenizers", str(error)), **settings)
    proved = f"tiktoken, proved to give the ids of tokenizers, and compared on {compared:,} texts"
    return replace(no_faster("tiktoken", why_not), reason=proved, **settings)


def fastokens_differs(
    fast: FastBPE, exact: TokenizersEncoder, backend: str, texts: Sequence[str], expected: tuple[np.ndarray, np.ndarray]
) -> str:
    """Why fastokens cannot be used; "" if it can. That tiktoken gives the same is compared with it."""
    if importlib.util.find_spec("fastokens") is None:
        return "it is not installed (pip install 'clm-dist[fast]')"
    try:
        compare(FastokensEncoder(fast, exact, backend, checked_every=1), texts, expected)
    except Exception as error:  # of a library that refuses some tokenizers with errors of any kind
        return f"fastokens refuses this tokenizer or gives other ids ({type(error).__name__}: {str(error)[:100]})"
    return ""


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
