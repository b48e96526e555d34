"""Where documents come from: local files, or a data set on the Hub, one text per record.

A source has splits, a split has parts (files), a part gives chunks of records. Parts are ordered by their contents, so
that neither names nor the order in which files were given decide which blocks come out.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clm_dist.config import DataConfig, MixtureEntry
from clm_dist.data.files import SUFFIXES, LocalFile, stamp_of, suffix
from clm_dist.data.records import Chunk
from clm_dist.errors import UserError, nearest

SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}  # what files are called after


class Part(Protocol):
    """A piece of a split that is read from its start to its end."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def key(self) -> str:
        """The contents and how they are read: equal keys, equal chunks."""
        ...

    @property
    def bytes(self) -> int | None:
        """Size on disk; None where it comes from elsewhere."""
        ...

    def num_chunks(self) -> int | None:
        """How many chunks there are; None where only reading tells."""
        ...

    def chunks(self, first: int = 0) -> Iterator[Chunk]:
        """The chunks in order from number `first` on."""
        ...

    def check_unchanged(self) -> None:
        """UserError where it is not what its key says any more."""
        ...


class Source(Protocol):
    """Documents by split, readable more than once."""

    def identity(self) -> dict[str, Any]:
        """What the contents are, whatever the files are called: equal identities, equal documents."""
        ...

    def parts(self, split: str) -> list[Part]:
        """The parts of a split, in the order in which their documents stand."""
        ...


def open_sources(config: DataConfig) -> list[Source]:
    """The sources of a recipe, one for each entry of the mixture; UserError where one does not exist."""
    return [open_source(config, entry) for entry in config.entries()]


def check_sources(config: DataConfig) -> None:
    """UserError where a source of a recipe does not exist. Reads no file; asks the Hub for a commit, once a process."""
    for entry in config.entries():
        if _files_of(entry) is None:
            open_source(config, entry)


def open_source(config: DataConfig, entry: MixtureEntry) -> Source:
    """The source that `entry` names; UserError where it does not exist. Reads no document yet."""
    splits = [split for split in (config.train_split, config.eval_split) if split is not None]
    files = _files_of(entry)
    if files is None:
        from clm_dist.data.hub_source import HubSource  # heavy, and only needed here

        return HubSource(entry, splits, config.streaming)
    names = [entry.source] if isinstance(entry.source, str) else entry.source
    inside = Path(config.prepared_dir).resolve()
    if any(inside.is_relative_to(folder.resolve()) for folder in map(Path, names) if folder.is_dir()):
        raise UserError(
            f"data.prepared_dir={config.prepared_dir} lies in data.source={', '.join(names)}, which would take it for text "
            "the next time; choose another place"
        )
    return LocalSource({split: _hashed(_of_split(files, split, config, names), entry) for split in splits})


@dataclass(frozen=True)
class LocalSource:
    """Documents from files on disk."""

    files: dict[str, list[LocalFile]]

    def identity(self) -> dict[str, Any]:
        """By split the keys of its files."""
        return {split: [file.key for file in files] for split, files in self.files.items()}

    def parts(self, split: str) -> list[Part]:
        """The files of a split."""
        return list(self.files[split])


def _files_of(entry: MixtureEntry) -> list[Path] | None:
    """The files of a local source; None of one on the Hub."""
    if isinstance(entry.source, str) and not _looks_local(entry.source):
        return None
    names = [entry.source] if isinstance(entry.source, str) else entry.source
    files = [path for name in names for path in _matching(name)]
    return list({path.resolve(): path for path in files}.values())  # named twice, in any way: one file


def _looks_local(name: str) -> bool:
    path = Path(name)
    if path.exists() or any(character in name for character in "*?["):
        return True
    return suffix(path) in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1


def _matching(name: str) -> list[Path]:
    """The files that one path or glob names."""
    path = Path(name).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _below(path)
    elif any(character in name for character in "*?["):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in anchor.glob(str(path.relative_to(path.anchor))) if p.is_file())
    else:
        beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"data.source={name} does not exist{nearest(str(path), beside)}; give a file, a folder, a glob or a list of them"
        )
    unknown = [str(p) for p in files if suffix(p) not in SUFFIXES]
    if unknown:
        raise UserError(
            f"{unknown[0]} is of no known kind; data.source takes {', '.join(SUFFIXES)}, each also with .gz"
        )
    if not files:
        raise UserError(f"data.source={name} holds no file that ends in {', '.join(SUFFIXES)} (also .gz)")
    return files


def _below(folder: Path) -> list[Path]:
    """The files of known kinds in a folder and those below it, through links too; what begins with a dot is no data."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from None

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(place).resolve()
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        seen.add(real)
    return [path for path in found if path.is_file() and suffix(path) in SUFFIXES]


def _of_split(files: list[Path], split: str, config: DataConfig, names: Iterable[str]) -> list[Path]:
    """The files of a split: all of them, or where splits are named those with the split's name in theirs."""
    words = {path: set(path.name.split(".")[0].replace("_", "-").split("-")) for path in files}
    named = [path for path in files if split in words[path]]
    called_after_splits = all(words[path] & SPLITS for path in files)
    if config.eval_split is None and config.train_split == "train" and not (named and called_after_splits):
        return files  # none is for training by its name, or some are called otherwise: all of them are text to train on
    if named:
        return named
    found = ", ".join(p.name for p in files[:10])
    raise UserError(
        f"no file of data.source={', '.join(names)} belongs to the split {split} (files: {found}); "
        f"name them like {split}.jsonl, or split one source by data.eval_fraction=0.2 and data.eval_split=null"
    )


def _hashed(paths: list[Path], entry: MixtureEntry) -> list[LocalFile]:
    stamps = [stamp_of(path) for path in paths]  # before they are hashed: what changes from then on is noticed
    files = [
        LocalFile(path, _sha256(path), str(entry.text_column), stamp) for path, stamp in zip(paths, stamps, strict=True)
    ]
    return sorted(files, key=lambda file: file.key)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None
