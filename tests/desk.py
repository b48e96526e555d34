"""A desk for tests of `prepare`: a tokenizer whose tokens are words, sources, and what was written read back.

It is read by `datasets` and numpy alone.
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import recipe_values

from clm_dist import recipe
from clm_dist.data.manifest import Manifest, read_manifest
from clm_dist.errors import UserError
from clm_dist.preparation.prepare import prepare

END = "<eos>"
VOCABULARY = [END, "<unk>", *(f"{source}{number}" for source in "abcde" for number in range(100)), *"xyz"]


def make_tokenizer(folder: Path, vocabulary: Sequence[str]) -> Path:
    """A word is a token; ~ is nothing."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.normalizer = normalizers.Replace("~", "")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, unk_token="<unk>").save_pretrained(folder)
    return folder


def documents(source: str, lengths: Sequence[int]) -> list[str]:
    """Texts of so many words, the first of which names source and document: 'a7 x x'."""
    return [" ".join([f"{source}{number}", *["x"] * (length - 1)]) for number, length in enumerate(lengths)]


def words(texts: Sequence[str]) -> list[list[str]]:
    """The tokens of documents, as they stand in blocks."""
    return [[*text.split(), END] for text in texts]


def flat(lists):
    return [word for one in lists for word in one]


def of_source(pieces, source):
    return [piece for piece in pieces if piece[0].startswith(source)]


def held_out(texts: Sequence[str], fraction: float, seed: int = 42) -> set[str]:
    """Those with the smallest BLAKE2b of their text."""

    def key(text):
        return hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "big")).digest()

    return set(sorted(texts, key=key)[: round(fraction * len(texts))])


def by_contents(*paths: Path) -> list[Path]:
    """Files in the order in which they are read: that of their SHA-256."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Prepared:
    """A finished data set."""

    folder: Path

    @property
    def manifest(self) -> Manifest:
        return read_manifest(str(self.folder))

    def rows(self, split: str = "train") -> np.ndarray:
        return np.array(datasets.load_from_disk(str(self.folder))[split]["input_ids"])

    def words(self, split: str = "train") -> list[str]:
        """All tokens of all blocks."""
        return [VOCABULARY[token] for token in self.rows(split).reshape(-1)]

    def pieces(self, split: str = "train") -> list[list[str]]:
        """What stands from one start to the next, without padding."""
        rows, starts = self.rows(split), np.load(self.folder / split / "documents.npy").tolist()
        kept = np.arange(rows.shape[1]) < self.used(split)[:, None]
        flat, kept = rows.reshape(-1), kept.reshape(-1)
        bounds = pairwise([*starts, len(flat)])
        return [[VOCABULARY[token] for token in flat[begin:end][kept[begin:end]]] for begin, end in bounds]

    def used(self, split: str = "train") -> np.ndarray:
        path, rows = self.folder / split / "used.npy", self.rows(split)
        return np.load(path) if path.exists() else np.full(len(rows), rows.shape[1])

    def contents(self) -> str:
        """Hash of the blocks and of where documents start in them."""
        paths = sorted([*self.folder.glob("*/*.arrow"), *self.folder.glob("*/*.npy")])
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@dataclass(frozen=True)
class Desk:
    """A folder to work in."""

    folder: Path
    tokenizer: Path

    def write(self, name: str, texts: Sequence[str], column: str = "text") -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps({column: text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
        return path

    def config(self, source, into="prepared", **data):
        """source: a path or several, or a list of entries of a mixture."""
        several = source if isinstance(source, list) else [source]
        if isinstance(several[0], dict):
            entries = [{**entry, "source": str(entry["source"])} for entry in several]
            text = {"source": None, "mixture": entries}
        else:
            text = {"source": [str(one) for one in several] if isinstance(source, list) else str(source)}
        text |= {"tokenizer": str(self.tokenizer), "tokenizer_vocab_size": None, "eval_fraction": 0.0, "block_size": 8}
        text |= {"prepared_dir": str(self.folder / into), **data}
        return recipe.build(recipe_values(self.folder, data=text))

    def prepare(self, source, into="prepared", **data) -> Prepared:
        prepare(self.config(source, into, **data))
        return Prepared(self.folder / into)

    def refused(self, source, needle: str, into="refused", **data) -> str:
        """The message; nothing may be left that opens, nor anything beside it."""
        with pytest.raises(UserError, match=needle) as caught:
            prepare(self.config(source, into, **data))
        assert not [path for path in self.folder.iterdir() if into in path.name]
        return str(caught.value)
