"""Which documents go where: held out or trained on, left out as too short, too long, or a copy.

All of it is decided from what units say of their documents (keys, lengths), unit by unit, in flat memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from clm_dist.config import DataConfig
from clm_dist.data.manifest import LeftOut, SplitCounts
from clm_dist.data.split import held_out_below
from clm_dist.errors import UserError
from clm_dist.preparation.packing import Documents
from clm_dist.preparation.units import UnitFile

DOCUMENTS_AT_ONCE = 2**21  # that are looked through for copies together: some 100 MB


@dataclass(frozen=True)
class Stretch:
    """The units of one source and one of its splits, in order."""

    source: int
    split: str  # as the source calls it
    units: tuple[UnitFile, ...]


class Selection:
    """Decides about every document of all units.

    copies: a file (made here) with one byte a document that says whether it is a copy of one before; None: copies stay.
    """

    def __init__(self, config: DataConfig, stretches: Sequence[Stretch], eos: int, copies: Path | None) -> None:
        self.config = config
        self.shortest = (config.min_document_tokens or 0) + eos  # lengths in units have the end-of-text
        self.longest = None if config.max_document_tokens is None else config.max_document_tokens + eos
        self.bound = 0
        if config.eval_fraction:
            trained_on = [
                unit for stretch in stretches if stretch.split == config.train_split for unit in stretch.units
            ]
            self.bound = held_out_below(partial(_keys, trained_on), config.eval_fraction)
        self._first: dict[UnitFile, int] = {}  # number of a unit's first document; a file given twice is there twice
        self._copies = None if copies is None else self._find_copies(stretches, copies)

    def check_held_out(self, stretches: Sequence[Stretch]) -> None:
        """UserError where some documents were to be held out and none can be."""
        if self.config.eval_fraction and not self.bound:
            documents = sum(len(keys) for stretch in stretches for keys in _keys(stretch.units))
            raise UserError(
                f"data.eval_fraction={self.config.eval_fraction} holds out none of {documents} documents with one and the "
                "same text; give more text, set data.eval_fraction=0 for no evaluation, or name a data.eval_split"
            )

    def documents(self, unit: UnitFile, split: str) -> Documents:
        """Those documents of a unit that belong to our split `train` or `eval`."""
        ids, lengths, keys = unit.read("ids", "lengths", "keys")
        wanted = self._wanted(unit, split, lengths, keys)
        if wanted.all():
            return Documents(ids, lengths)
        return Documents(ids[np.repeat(wanted, lengths)], lengths[wanted])

    def sizes(self, unit: UnitFile, split: str) -> np.ndarray:
        """The UTF-8 bytes of each of the same documents."""
        sizes, lengths, keys = unit.read("sizes", "lengths", "keys")
        return np.asarray(sizes[self._wanted(unit, split, lengths, keys)])

    def _wanted(self, unit: UnitFile, split: str, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return self._on_side(keys, split) & self._fits(lengths) & ~self._is_copy(unit, len(lengths))

    def left_out(self, units: Sequence[UnitFile], splits: dict[str, SplitCounts]) -> LeftOut:
        """How many documents are left out, and why."""
        found = LeftOut(unused=sum(share["unused"] for counts in splits.values() for share in counts.shares))
        for unit in units:
            [lengths] = unit.read("lengths")
            empty, bad = unit.notes()
            short = lengths < self.shortest
            long = np.zeros_like(short) if self.longest is None else lengths > self.longest
            copies = self._is_copy(unit, len(lengths)) & ~short & ~long
            found = replace(
                found,
                empty=found.empty + empty,
                bad=found.bad + len(bad),
                too_short=found.too_short + int(short.sum()),
                too_long=found.too_long + int(long.sum()),
                copies=found.copies + int(copies.sum()),
            )
        return found

    def _on_side(self, keys: np.ndarray, split: str) -> np.ndarray:
        if not self.bound:
            return np.ones(len(keys), dtype=bool)
        held_out = keys < np.uint64(self.bound)
        return held_out if split == "eval" else ~held_out

    def _fits(self, lengths: np.ndarray) -> np.ndarray:
        fits = lengths >= self.shortest
        return fits if self.longest is None else fits & (lengths <= self.longest)

    def _is_copy(self, unit: UnitFile, documents: int) -> np.ndarray:
        if self._copies is None:
            return np.zeros(documents, dtype=bool)
        first = self._first[unit]
        return np.asarray(self._copies[first : first + documents], dtype=bool)

    def _find_copies(self, stretches: Sequence[Stretch], path: Path) -> np.ndarray:
        """Marks every document whose text stood before. Named evaluation splits come first, so that it is training that
        loses what stands in both."""
        ordered = sorted(stretches, key=lambda stretch: stretch.split != self.config.eval_split)
        units = [unit for stretch in ordered for unit in stretch.units]
        total = 0
        for unit in units:
            self._first[unit] = total
            total += len(unit.read("keys")[0])
        copies = np.memmap(path, dtype=np.uint8, mode="w+", shape=(max(total, 1),))
        passes = -(-total // DOCUMENTS_AT_ONCE) or 1
        for low, high in _ranges(passes):
            keys, digests, numbers = _documents_between(units, self._first, low, high)
            order = np.lexsort((numbers, digests, keys))
            same = (keys[order][1:] == keys[order][:-1]) & (digests[order][1:] == digests[order][:-1])
            copies[numbers[order][1:][same]] = 1
        return copies


def _keys(units: Sequence[UnitFile]) -> Iterator[np.ndarray]:
    return (unit.read("keys")[0] for unit in units)


def _ranges(passes: int) -> Iterator[tuple[int, int]]:
    """The range of keys in so many equal parts, both ends included."""
    width = 2**64 // passes
    for number in range(passes):
        yield number * width, 2**64 - 1 if number == passes - 1 else (number + 1) * width - 1


def _documents_between(
    units: Sequence[UnitFile], first: dict[UnitFile, int], low: int, high: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, digests and numbers of the documents with keys from `low` to `high`."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for unit in units:
        keys, digests = unit.read("keys", "digests")
        chosen = np.flatnonzero((keys >= np.uint64(low)) & (keys <= np.uint64(high)))
        found.append((keys[chosen], digests[chosen], chosen + first[unit]))
    keys, digests, numbers = (np.concatenate(column) for column in zip(*found, strict=True))
    return keys, digests, numbers
