"""`prepare`: documents to blocks on disk, once, by one process, before any process group exists."""

import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clm_dist.config import Config
from clm_dist.data import split as splitting
from clm_dist.data import tokenize
from clm_dist.data.blocks import Blocks, group, write_blocks
from clm_dist.data.manifest import MANIFEST, Manifest, SplitCounts, check_fits, options_of, read_manifest, source_name
from clm_dist.data.source import Source, open_source
from clm_dist.errors import UserError
from clm_dist.progress import progress
from clm_dist.versions import versions


@dataclass(frozen=True)
class Documents:
    """The documents of one of our two splits: those of `name` in the source whose key passes."""

    source: Source
    name: str
    seed: int
    lowest: int = 0
    below: int = 2**64

    def __iter__(self) -> Iterator[str]:
        for text in self.source.texts(self.name):
            if text and (self._all or self.lowest <= splitting.document_key(text, self.seed) < self.below):
                yield text

    @property
    def _all(self) -> bool:
        return self.lowest == 0 and self.below == 2**64


def prepare(config: Config) -> None:
    """Writes data.prepared_dir, or says that it is there already. Nothing half-written is ever left under that name."""
    target = Path(config.data.prepared_dir)
    if not target.name:
        raise UserError(
            f"data.prepared_dir={config.data.prepared_dir!r} is no name for a new folder; set e.g. prepared/demo"
        )
    source = open_source(config.data)
    # before the data, which may be large: a wrong name is told before it is fetched
    tokenizer = None if config.data.tokenizer_vocab_size else _load_tokenizer(config)
    identity = source.identity()
    if (target / MANIFEST).exists():
        manifest = read_manifest(config.data.prepared_dir)
        check_fits(manifest, config, identity, _wanted_tokenizer_sha256(config, manifest, tokenizer))
        print(f"already prepared, nothing to do: {target} holds just this")
        announce(manifest, target)
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"data.prepared_dir={target} exists and was not written by prepare; choose another folder or empty this one"
        )
    # what can be refused is refused before anything is written
    splits, empty = scan(config, source)
    if tokenizer is None:
        assert config.data.tokenizer_vocab_size is not None
        tokenizer = tokenize.train_tokenizer(splits["train"], config.data.tokenizer_vocab_size)
    with staging(target) as folder:
        counts = {name: write_split(folder, name, splits[name], tokenizer, config) for name in splits}
        counts = {name: replace(counts[name], empty_documents=empty[name]) for name in splits}
        _write_json(folder / "dataset_dict.json", '{"splits": ["train", "eval"]}')
        tokenize.save_tokenizer(tokenizer, folder / "tokenizer")
        manifest = Manifest(
            options=options_of(config),
            source=source_name(config),
            source_identity=identity,
            tokenizer=tokenize.tokenizer_name(config),
            tokenizer_sha256=tokenize.tokenizer_sha256(tokenizer),
            vocab_size=tokenize.vocab_size(tokenizer),
            splits=counts,
            versions=versions(),
        )
        manifest.save(folder)
    announce(manifest, target)


def open_prepared(config: Config) -> Manifest:
    """The manifest of the recipe's prepared data, checked to be what the recipe asks for.

    Source and tokenizer are read only where they are called otherwise than at `prepare`: compute nodes may have neither.
    """
    manifest = read_manifest(config.data.prepared_dir)
    identity, sha256 = manifest.source_identity, manifest.tokenizer_sha256
    if manifest.source != source_name(config):
        identity = open_source(config.data).identity()
    if manifest.tokenizer != tokenize.tokenizer_name(config):
        sha256 = _wanted_tokenizer_sha256(config, manifest, None)
    check_fits(manifest, config, identity, sha256)
    return manifest


def open_blocks(config: Config, manifest: Manifest, split: str) -> Blocks:
    """The blocks of a split, as many as the manifest counts: a copy cut short may well be readable."""
    folder, expected = Path(config.data.prepared_dir) / split, manifest.splits[split].blocks
    remedy = f"copy it again, or remove {folder.parent} and prepare again"
    try:
        blocks = Blocks(folder)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{folder} is damaged ({error}); {remedy}") from None
    if len(blocks) != expected:
        raise UserError(f"{folder} holds {len(blocks)} blocks, its manifest says {expected}; {remedy}")
    return blocks


def scan(config: Config, source: Source) -> tuple[dict[str, Documents], dict[str, int]]:
    """Reads every document once: finds broken records before anything is written, and where the splits part.

    Returns the documents of `train` and `eval`, and how many empty ones each leaves out.
    """
    data = config.data
    keys, empty = [], 0
    for text in progress(source.texts(data.train_split), "reading", "documents"):
        if text:
            keys.append(splitting.document_key(text, data.split_seed))
        else:
            empty += 1
    if not keys:
        raise UserError(
            f"data.source={data.source} holds no text in column {data.text_column} ({empty} empty documents); "
            "check data.source and data.text_column"
        )
    if data.eval_split is not None:
        filled = [bool(text) for text in source.texts(data.eval_split)]
        if not any(filled):
            raise UserError(
                f"split {data.eval_split} of data.source={data.source} holds no text in column {data.text_column}; "
                "check data.eval_split"
            )
        train = Documents(source, data.train_split, data.split_seed)
        held_out = Documents(source, data.eval_split, data.split_seed)
        return {"train": train, "eval": held_out}, {"train": empty, "eval": filled.count(False)}
    bound = splitting.held_out_below(np.array(keys, dtype=np.uint64), data.eval_fraction or 0)
    if data.eval_fraction and not bound:
        raise UserError(
            f"data.eval_fraction={data.eval_fraction} holds out none of {len(keys)} documents with one and the same text"
            "; give more text, set data.eval_fraction=0 for no evaluation, or name a data.eval_split"
        )
    held_out = Documents(source, data.train_split, data.split_seed, below=bound)
    train = Documents(source, data.train_split, data.split_seed, lowest=bound)
    return {"train": train, "eval": held_out}, {"train": empty, "eval": 0}


def write_split(folder: Path, name: str, documents: Documents, tokenizer: Any, config: Config) -> SplitCounts:
    """Tokenises, groups and writes one split; checks that no token was lost."""
    total = {"documents": 0, "bytes": 0, "tokens": 0}
    remainder = np.empty(0)

    def counted_texts() -> Iterator[str]:
        for text in progress(documents, f"tokenising {name}", "documents"):
            total["documents"] += 1
            total["bytes"] += len(text.encode("utf-8"))
            yield text

    def counted_ids() -> Iterator[np.ndarray]:
        for _, ids in tokenize.tokenize(counted_texts(), tokenizer, config.data.append_eos):
            total["tokens"] += len(ids)
            yield ids

    def grouped() -> Iterator[np.ndarray]:
        nonlocal remainder
        remainder = yield from group(counted_ids(), config.data.block_size)

    dtype = tokenize.ids_dtype(tokenize.vocab_size(tokenizer))
    blocks = write_blocks(folder / name, grouped(), config.data.block_size, dtype, name)
    if total["tokens"] != blocks * config.data.block_size + len(remainder):
        raise AssertionError(f"{name}: {total['tokens']} tokens in, {blocks} blocks + {len(remainder)} out")
    if blocks == 0 and (total["tokens"] > 0 or name == "train"):
        raise UserError(
            f"the {name} split has {total['tokens']} tokens, fewer than one block of data.block_size="
            f"{config.data.block_size}; lower block_size or give more text"
        )
    return SplitCounts(total["documents"], 0, total["bytes"], total["tokens"], blocks, len(remainder))


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it when all is written, and vanishes when anything goes wrong."""
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        folder.mkdir(parents=True)
        with _terminable():
            yield folder
        if (target / MANIFEST).exists():
            raise UserError(f"data.prepared_dir={target} was written by another prepare meanwhile; run this one again")
        if target.exists():
            target.rmdir()  # empty: checked at the start
        folder.rename(target)
    except OSError as error:
        raise UserError(
            f"cannot write data.prepared_dir={target}: {error.strerror or error}; free some space or choose another place"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that a cancelled batch job leaves no partial folder."""

    before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def announce(manifest: Manifest, target: Path) -> None:
    """Prints the arithmetic of what was prepared."""
    block_size = manifest.options["block_size"]
    for name, c in manifest.splits.items():
        print(
            f"{name:<6} {c.documents:,} documents ({c.empty_documents:,} empty left out), {c.tokens:,} tokens = "
            f"{c.blocks:,} blocks x {block_size} + {c.remainder}"
        )
    print(f"prepared in {target} (tokenizer: {manifest.tokenizer}, {manifest.vocab_size:,} tokens)")


def _wanted_tokenizer_sha256(config: Config, manifest: Manifest, tokenizer: Any) -> str:
    if config.data.tokenizer_vocab_size is None:
        return tokenize.tokenizer_sha256(tokenizer or _load_tokenizer(config))
    if manifest.tokenizer == tokenize.tokenizer_name(config):
        return manifest.tokenizer_sha256  # trained on the same documents by the same rule: the same
    return "unknown before training a " + tokenize.tokenizer_name(config)


def _load_tokenizer(config: Config) -> Any:
    by_model = config.data.tokenizer is None
    revision = config.model.revision if by_model else None
    return tokenize.load_tokenizer(tokenize.tokenizer_name(config), revision, config.model.trust_remote_code)


def _write_json(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
