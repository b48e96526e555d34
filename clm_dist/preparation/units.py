"""Units: what became of one chunk of records, in one file, whole or not there at all."""

import json
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from clm_dist.data.records import Bad


@dataclass(frozen=True)
class Unit:
    """The documents of one chunk. n: documents, those without text left out."""

    ids: np.ndarray  # (tokens,): all documents one after another, end-of-text included
    lengths: np.ndarray  # (n,) int64: tokens of each, end-of-text included
    sizes: np.ndarray  # (n,) int64: UTF-8 bytes of each
    keys: np.ndarray  # (n,) uint64: decides which are held out
    digests: np.ndarray  # (n,) uint64: with the key, 128 bits that stand for the text; empty where copies are kept
    empty: int  # documents left out: nothing or only white space in them
    bad: list[Bad]

    def save(self, path: Path) -> None:
        """Under its name only when all of it is written. No fsync: a file torn by a power cut fails its check sum."""
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        notes = {"empty": self.empty, "bad": [asdict(bad) for bad in self.bad]}
        try:
            with partial.open("wb") as file:
                arrays = {name: getattr(self, name) for name in ("ids", "lengths", "sizes", "keys", "digests")}
                np.savez(file, notes=np.frombuffer(json.dumps(notes).encode("utf-8"), dtype=np.uint8), **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class DamagedUnitError(Exception):
    """A unit that cannot be read back."""

    def __init__(self, path: Path, reason: Exception) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class UnitFile:
    """A unit on disk, read array by array; each is checked against its check sum (that of the zip format)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, *names: str) -> list[np.ndarray]:
        """Some of its arrays."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return [arrays[name] for name in names]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedUnitError(self.path, error) from None

    def notes(self) -> tuple[int, list[Bad]]:
        """How many documents were empty, and the bad records."""
        [raw] = self.read("notes")
        notes = json.loads(raw.tobytes())
        return notes["empty"], [Bad(**bad) for bad in notes["bad"]]
