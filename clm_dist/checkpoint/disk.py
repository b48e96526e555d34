"""The few things that are done to a disk, each lasting when it returns: the places where a test can let one fail."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clm_dist.storage import sync

CHUNK = 16 * 2**20  # bytes written and hashed at a time


def write(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    """Writes bytes-like pieces to a new file and forces it to disk; returns its `sha256` and `bytes`."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for begin in range(0, len(view), CHUNK):
                chunk = view[begin : begin + CHUNK]
                digest.update(chunk)  # releases the GIL, as writing does: training goes on meanwhile
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            size += len(view)
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def sha256(path: Path) -> str:
    """What `write` returned for an unchanged file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename(source: Path, target: Path) -> None:
    """Gives a file or folder another name in the same folder, lastingly."""
    source.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to disk."""
    sync(folder)


def make_folder(folder: Path) -> None:
    """A folder that is there or not yet."""
    folder.mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Takes away a folder with all that is in it."""
    shutil.rmtree(folder)
