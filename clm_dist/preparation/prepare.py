"""`prepare`: documents to blocks on disk, once, before any process group exists.

Chunks of records become units, by as many processes as there are (`encode`); all units become the data set (`assemble`).
A unit depends on its chunk and the tokenizer alone, and the data set on the units in their order, so the result is the
same to the last byte for every number of workers and shards, and whatever was killed on the way.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clm_dist.config import Config
from clm_dist.data import tokenize
from clm_dist.data.manifest import MANIFEST, Manifest, check_fits, key_of, options_of, read_manifest, source_name
from clm_dist.data.prepared import check_whole, identity_of, wanted_tokenizer
from clm_dist.data.records import CHUNK_BYTES
from clm_dist.data.source import open_sources
from clm_dist.errors import RunError, UserError
from clm_dist.preparation.assemble import Assembly, check_sums, write_bad_records
from clm_dist.preparation.corpus import Corpus
from clm_dist.preparation.encode import Choice, choose
from clm_dist.preparation.encoders import DifferentIdsError
from clm_dist.preparation.encoding import Progress, encode
from clm_dist.preparation.selection import Selection
from clm_dist.preparation.training import trained_tokenizer
from clm_dist.preparation.units import DamagedUnitError
from clm_dist.preparation.work import Shard, WorkFolder
from clm_dist.preparation.worker import Task
from clm_dist.storage import sync
from clm_dist.versions import versions

SAMPLE_CHARACTERS = 200_000  # of the user's text, on which encoders are compared before one is chosen


def prepare(config: Config, shard: Shard | None = None, workers: int | None = None, encoder: str | None = None) -> None:
    """Writes data.prepared_dir, or says that it is there already, or what other shards still have to do.

    Nothing half-written ever stands under that name. What was done before an interruption is kept beside it.
    """
    shard = shard or Shard()
    target = Path(config.data.prepared_dir)
    if not target.name or os.path.ismount(target):
        raise UserError(
            f"data.prepared_dir={config.data.prepared_dir!r} is no name for a new folder; set e.g. prepared/demo"
        )
    target = target.resolve() if target.is_symlink() else target  # a link is not renamed over, what it names is
    corpus = Corpus(config.data, open_sources(config.data))
    # before the data, which may be large: a wrong name is told before it is fetched
    tokenizer = None if config.data.tokenizer_vocab_size else tokenize.load_tokenizer_of(config)
    if tokenizer is not None:
        tokenize.document_end(config, tokenizer)  # or a refusal
    identity = identity_of(corpus.sources)
    if (target / MANIFEST).exists():
        manifest = read_manifest(config.data.prepared_dir)
        check_fits(manifest, config, identity, wanted_tokenizer(config, manifest, tokenizer))
        check_whole(manifest, target)
        print(f"already prepared, nothing to do: {target} holds just this")
        announce(manifest, target)
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"data.prepared_dir={target} exists and was not written by prepare; choose another folder or empty this one"
        )
    if config.data.on_error == "stop":
        corpus.check_first_records()
    work = WorkFolder(target)
    sha256 = None if tokenizer is None else tokenize.tokenizer_sha256(tokenizer)
    with _told(target, work), _terminable(), work.held(shard, work_key(config, identity, sha256)):
        if tokenizer is None:
            with work.alone("plan"):  # one process trains it, the others wait
                tokenizer = trained_tokenizer(config.data, corpus, work)
        choice = choose(tokenizer, corpus.sample(SAMPLE_CHARACTERS), encoder)
        progress = _encode(config, corpus, work, choice, tokenizer, shard, workers)
        if progress.missing:
            print(f"{shard} is done; {progress}")
            return
        with work.alone("assemble"):
            if not (target / MANIFEST).exists():  # else another shard saw it first that all was there
                sha256 = sha256 or tokenize.tokenizer_sha256(tokenizer)
                try:
                    _assemble(config, corpus, work, tokenizer, (identity, sha256))
                finally:
                    shutil.rmtree(work.result, ignore_errors=True)  # renamed, or of no use
        manifest = read_manifest(config.data.prepared_dir)
        work.remove()
    announce(manifest, target)


def work_key(config: Config, identity: Any, tokenizer_sha256: str | None) -> str:
    """Hash of what units depend on beside their chunks: units of one key may be used together.

    A tokenizer that is still to be trained (None) is a function of the source and the options.
    """
    data = config.data
    parts: list[Any] = [CHUNK_BYTES, data.append_eos, data.on_error, data.deduplicate, data.split_seed]
    parts += [version("pyarrow"), version("datasets")]  # whose batches decide where chunks of parquet and Hub data end
    if tokenizer_sha256 is None:
        parts += [data.tokenizer_vocab_size, identity, options_of(config)]
    else:
        parts.append(tokenizer_sha256)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _encode(
    config: Config, corpus: Corpus, work: WorkFolder, choice: Choice, tokenizer: Any, shard: Shard, workers: int | None
) -> Progress:
    """Makes the units that are this shard's and not there yet."""
    data, end = config.data, tokenize.document_end(config, tokenizer)
    print(f"tokenising with {choice.reason}")
    if end is not None and end == tokenizer.sep_token_id:
        print(
            f"documents end with {tokenizer.eos_token}, the tokenizer's separator (data.append_eos=false: with nothing)"
        )
    task = Task(
        choice=choice,
        eos_token_id=end,
        separator=data.text_separator,
        split_seed=data.split_seed,
        deduplicate=data.deduplicate,
        stop_on_error=data.on_error == "stop",
    )
    try:
        return encode(corpus, work, task, shard, workers)
    except DifferentIdsError as error:
        work.forget()  # what it made before may be wrong as well
        raise RunError(
            f"fastokens gave other ids than tiktoken {error}; nothing that it made is kept; use --encoder tiktoken, and "
            "tell its makers"
        ) from None


def _assemble(config: Config, corpus: Corpus, work: WorkFolder, tokenizer: Any, contents: tuple[Any, str]) -> None:
    """All units to the data set, in a folder beside the target that takes its name last.

    contents: what the source is and the hash of the tokenizer.
    """
    data, folder = config.data, work.result
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stretches = corpus.stretches(work)
    units = [unit for stretch in stretches for unit in stretch.units]
    corpus.check_text(stretches)
    copies = work.folder / "copies" if data.deduplicate else None
    selection = Selection(data, stretches, int(data.append_eos), copies)
    selection.check_held_out(stretches)
    vocab_size = tokenize.vocab_size(tokenizer)
    dtype = tokenize.ids_dtype(vocab_size)
    padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    assembly = Assembly(data, stretches, selection, next(one for one in padding if one is not None))
    splits = {split: assembly.write_split(folder / split, split, dtype) for split in ("train", "eval")}
    tokenize.save_tokenizer(tokenizer, folder / "tokenizer")
    write_bad_records(folder, units)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "eval"]}\n')  # without it `datasets` opens nothing
    options, (identity, sha256) = options_of(config), contents
    Manifest(
        key=key_of(identity, sha256, options),
        options=options,
        source=source_name(config),
        source_identity=identity,
        tokenizer=tokenize.tokenizer_name(config),
        tokenizer_sha256=sha256,
        tokenizer_commit=tokenize.tokenizer_commit(config),
        vocab_size=vocab_size,
        dtype=dtype.name,
        left_out=selection.left_out(units, splits),
        splits=splits,
        files=check_sums(folder, assembly.blocks_by_file),
        versions=versions(),
    ).save(folder)
    sync(folder / MANIFEST)
    sync(folder)
    target = work.target
    if target.exists():
        target.rmdir()  # empty: checked at the start
    folder.rename(target)
    sync(target.parent)


def announce(manifest: Manifest, target: Path) -> None:
    """Prints the arithmetic of what was prepared."""
    block_size = manifest.options["block_size"]
    for name, c in manifest.splits.items():
        padding = f" - {c.padding} padding ({c.padding / max(1, c.tokens + c.padding):.2%})" if c.padding else ""
        print(
            f"{name:<6} {c.documents:,} documents, {c.tokens:,} tokens = {c.blocks:,} blocks x {block_size}{padding} + "
            f"{c.remainder} left over"
        )
    print(f"left out: {manifest.left_out}")
    print(f"prepared in {target} (tokenizer: {manifest.tokenizer}, {manifest.vocab_size:,} tokens, {manifest.dtype})")


@contextmanager
def _told(target: Path, work: WorkFolder) -> Iterator[None]:
    """What goes wrong on the way, with what is kept and what to do."""
    try:
        yield
    except DamagedUnitError as error:
        error.path.unlink(missing_ok=True)
        raise RunError(f"{error}: damaged on the disk, and removed; the same command makes it again") from None
    except RunError as error:
        raise RunError(f"{error}; {work.kept()}") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space or choose another place" if full else "choose another place"
        raise UserError(
            f"cannot write data.prepared_dir={target}: {error.strerror or error}; {remedy}; {work.kept()}"
        ) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: in order, with the workers."""
    before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
