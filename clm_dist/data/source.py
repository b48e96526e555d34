"""Where documents come from: local files, or a data set on the Hub, one text per record.

A source has splits, a split has parts (files), a part gives chunks of records. Parts are ordered by their contents, so
that neither names nor the order in which files were given decide which blocks come out.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clm_dist.config import DataConfig, MixtureEntry
from clm_dist.data.files import SUFFIXES, LocalFile, suffix
from clm_dist.data.records import Chunk
from clm_dist.errors import UserError, nearest


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
    def bytes(self) -> int:
        """Size where it is known, for progress; 0 where not."""
        ...

    def num_chunks(self) -> int | None:
        """How many chunks there are; None where only reading tells."""
        ...

    def chunks(self, first: int = 0) -> Iterator[Chunk]:
        """The chunks in order from number `first` on."""
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


def open_source(config: DataConfig, entry: MixtureEntry) -> Source:
    """The source that `entry` names; UserError where it does not exist. Reads no document yet."""
    splits = [split for split in (config.train_split, config.eval_split) if split is not None]
    if isinstance(entry.source, str) and not _looks_local(entry.source):
        from clm_dist.data.hub_source import HubSource  # heavy, and only needed here

        return HubSource(entry, splits, config.streaming)
    names = [entry.source] if isinstance(entry.source, str) else entry.source
    files = [path for name in names for path in _matching(name)]
    files = list(dict.fromkeys(files))  # a file that two globs name is one file
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
        files = sorted(p for p in path.rglob("*") if p.is_file() and suffix(p) in SUFFIXES)
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


def _of_split(files: list[Path], split: str, config: DataConfig, names: Iterable[str]) -> list[Path]:
    """The files of a split: all of them, or where splits are named those with the split's name in theirs."""
    named = [p for p in files if split in p.name.split(".")[0].replace("_", "-").split("-")]
    if named:
        return named
    if config.eval_split is None and config.train_split == "train":
        return files  # no file is called after a split: all of them are text to train on
    found = ", ".join(p.name for p in files[:10])
    raise UserError(
        f"no file of data.source={', '.join(names)} belongs to the split {split} (files: {found}); "
        f"name them like {split}.jsonl, or split one source by data.eval_fraction=0.2 and data.eval_split=null"
    )


def _hashed(paths: list[Path], entry: MixtureEntry) -> list[LocalFile]:
    files = [LocalFile(path, _sha256(path), str(entry.text_column)) for path in paths]
    return sorted(files, key=lambda file: file.key)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None
