"""Units to a finished data set: documents chosen, packed into blocks, written, counted again from what was written."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.config import DataConfig
from clm_dist.data.blocks import Blocks, BlockWriter
from clm_dist.data.manifest import MANIFEST, SplitCounts
from clm_dist.errors import UserError
from clm_dist.preparation.mixture import Taken, interleave
from clm_dist.preparation.packing import Documents, Packed, best_fit, concatenate
from clm_dist.preparation.selection import Selection, Stretch
from clm_dist.preparation.units import UnitFile
from clm_dist.storage import sync

BAD_RECORDS = "bad_records.jsonl"


@dataclass
class Tally:
    """What went into a split, counted document by document as it passed."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    cut: int = 0

    def add(self, documents: Documents, block_size: int) -> None:
        """Counts all but bytes."""
        self.documents += len(documents.lengths)
        self.tokens += len(documents.ids)
        self.cut += int((documents.lengths > block_size).sum())


class Assembly:
    """Writes splits of one data set."""

    def __init__(self, config: DataConfig, stretches: Sequence[Stretch], selection: Selection, pad_id: int) -> None:
        self.config = config
        self.stretches = stretches
        self.selection = selection
        self.pad_id = pad_id
        self.blocks_by_file: dict[str, int] = {}

    def write_split(self, folder: Path, split: str, dtype: np.dtype[Any]) -> SplitCounts:
        """One split: each independent shard (or all as one) packed by itself, one after another."""
        tally, shares, remainder = Tally(), self._no_shares(), 0
        writer = BlockWriter(folder, self.config.block_size, dtype, split)
        for shard in range(self.config.independent_shards or 1):
            documents = self._mixed(split, shard, tally, shares)
            remainder += self._pack(documents, writer)
        writer.close()
        self.blocks_by_file |= {f"{split}/{name}": blocks for name, blocks in writer.blocks_by_file().items()}
        counted = SplitCounts(
            documents=tally.documents,
            bytes=tally.bytes,
            tokens=tally.tokens,
            blocks=writer.blocks,
            remainder=remainder,
            padding=writer.padding,
            cut_documents=tally.cut if self.config.packing == "best_fit" else 0,
            shares=shares,
        )
        check_conservation(folder, split, counted, self.config)
        return counted

    def _pack(self, documents: Iterator[Documents], writer: BlockWriter) -> int:
        size = self.config.block_size
        if self.config.packing == "best_fit":
            packed = best_fit(documents, size, self.pad_id)
        else:
            packed = concatenate(documents, size)
        while True:
            try:
                piece: Packed = next(packed)
            except StopIteration as end:
                writer.end_stream()
                return int(end.value)
            writer.write(piece.blocks, piece.starts, piece.used)

    def _mixed(self, split: str, shard: int, tally: Tally, shares: list[dict[str, Any]]) -> Iterator[Documents]:
        """The documents of a split (of one independent shard of it), of all sources in their proportions."""
        of_source = [self._units(split, shard, source) for source in range(len(self.config.entries()))]
        if not self.config.mixture:
            yield from self._documents(of_source[0], split, tally)
            return
        streams = [partial(self._documents, units, split) for units in of_source]
        # a held-out document that counted twice would count more
        stop = self.config.mixture_stop if split == "train" else "first_exhausted"
        mixture = interleave(streams, [entry.weight for entry in self.config.entries()], stop)
        while True:
            try:
                documents = next(mixture)
            except StopIteration as end:
                taken: list[Taken] = end.value
                break
            tally.add(documents, self.config.block_size)
            yield documents
        sizes = [self._sizes(units, split, one) for units, one in zip(of_source, taken, strict=True)]
        self._check_none_is_empty(split, [total for total, _ in sizes])
        for share, one, (total, size) in zip(shares, taken, sizes, strict=True):
            tally.bytes += size
            share["documents"] += one.documents
            share["tokens"] += one.tokens
            share["passes"] += one.passes
            share["unused"] += max(0, total - one.documents)

    def _check_none_is_empty(self, split: str, totals: list[int]) -> None:
        """A source without documents would end a mixture at once, with all that the others have unused."""
        if 0 in totals and any(totals):
            data = self.config
            raise UserError(
                f"data.mixture: {data.entries()[totals.index(0)].source} has no document for the {split} split"
                f"{' in one of data.independent_shards' if data.independent_shards else ''} (too short, too long, a copy, "
                "or none held out); give it more text, change data.eval_fraction or what leaves documents out, or take it "
                "out of the mixture"
            )

    def _no_shares(self) -> list[dict[str, Any]]:
        zero = {"documents": 0, "tokens": 0, "passes": 0, "unused": 0}
        return [{"weight": entry.weight, **zero} for entry in self.config.mixture]

    def _units(self, split: str, shard: int, source: int) -> list[UnitFile]:
        """The units of a source from which a split is taken; of `independent_shards` runs of them one."""
        name = self.config.eval_split if split == "eval" and self.config.eval_split else self.config.train_split
        if split == "eval" and not self.config.eval_split and not self.selection.bound:
            return []
        units = [
            unit
            for stretch in self.stretches
            if (stretch.source, stretch.split) == (source, name)
            for unit in stretch.units
        ]
        shards = self.config.independent_shards or 1
        return units[len(units) * shard // shards : len(units) * (shard + 1) // shards]

    def _documents(self, units: Sequence[UnitFile], split: str, tally: Tally | None = None) -> Iterator[Documents]:
        for unit in units:
            documents = self.selection.documents(unit, split)
            if tally is not None:
                tally.bytes += int(self.selection.sizes(unit, split).sum())
                tally.add(documents, self.config.block_size)
            yield documents

    def _sizes(self, units: Sequence[UnitFile], split: str, taken: Taken) -> tuple[int, int]:
        """How many documents there are, and the bytes of those that were taken: whole passes, and the first of the next."""
        total = sum(len(self.selection.sizes(unit, split)) for unit in units)
        left, once, begun = taken.documents - taken.passes * total, 0, 0
        for unit in units:
            sizes = self.selection.sizes(unit, split)
            once += int(sizes.sum())
            begun += int(sizes[: max(0, left)].sum())
            left -= len(sizes)
        return total, taken.passes * once + begun


def check_conservation(folder: Path, split: str, counted: SplitCounts, config: DataConfig) -> None:
    """Tokens in == blocks x block_size + remainder, the blocks counted from the files, and documents likewise.

    A failure is a bug of ours: AssertionError, so that nothing is renamed into place.
    """
    written = Blocks(folder)
    out = len(written) * config.block_size + counted.remainder
    assert counted.tokens + counted.padding == out, f"{split}: {counted.tokens} tokens in, {out} out"
    assert len(written) == counted.blocks, f"{split}: {counted.blocks} blocks in, {len(written)} in files"
    assert written.num_padding == counted.padding, (
        f"{split}: {counted.padding} padding in, {written.num_padding} in files"
    )
    wanted = split == "train" or config.eval_split or config.eval_fraction
    if counted.tokens == 0 and wanted:
        raise UserError(
            f"the {split} split has no document left: all are too short, too long or copies; change "
            f"data.min_document_tokens={config.min_document_tokens}, data.max_document_tokens={config.max_document_tokens} "
            f"or data.deduplicate={config.deduplicate}, or give more text"
        )
    if counted.blocks == 0 and wanted:
        raise UserError(
            f"the {split} split has {counted.tokens} tokens, fewer than one block of data.block_size="
            f"{config.block_size}; lower block_size or give more text"
        )


def write_bad_records(folder: Path, units: Sequence[UnitFile]) -> None:
    """Every record that was skipped, with its place and what is wrong with it; no file where there is none."""
    rows = (json.dumps(asdict(bad), ensure_ascii=False) for unit in units for bad in unit.notes()[1])
    first = next(rows, None)
    if first is None:
        return
    with (folder / BAD_RECORDS).open("w", encoding="utf-8") as file:
        file.write(first + "\n")
        file.writelines(row + "\n" for row in rows)


def check_sums(folder: Path, blocks: dict[str, int]) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file in the folder, as read back, and how many blocks it holds; all is on the disk then."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        sync(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"sha256": digest, "bytes": path.stat().st_size}
        if name in blocks:
            files[name]["blocks"] = blocks[name]
    return files
