"""Where documents come from: local files or a data set on the Hub, one text per record.

A document is one record's text column (for .txt: what stands between blank lines). Every complaint names file and line.
"""

import codecs
import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from clm_dist.config import DataConfig
from clm_dist.errors import UserError, nearest

SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".parquet")


class Source(Protocol):
    """Documents by split, readable more than once."""

    def identity(self) -> dict[str, Any]:
        """What the contents are, whatever the files are called: equal identities, equal documents."""
        ...

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split, in order."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that `config` names; UserError where it does not exist. Reads no document yet."""
    path = Path(config.source).expanduser()
    splits = [split for split in (config.train_split, config.eval_split) if split is not None]
    if path.exists() or any(c in config.source for c in "*?["):
        return LocalSource(config, {split: split_files(config, split) for split in splits})
    looks_local = _suffix(path) in SUFFIXES or config.source.startswith((".", "/", "~")) or config.source.count("/") > 1
    if looks_local:
        beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"data.source={config.source} does not exist{nearest(str(path), beside)}; give a file, folder or glob"
        )
    from clm_dist.data.hub_source import HubSource  # heavy, and only needed here

    return HubSource(config, splits)


def split_files(config: DataConfig, split: str) -> list[Path]:
    """The files of a split: all of them, or where splits are named those with the split's name in theirs."""
    path = Path(config.source).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES)
    else:
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in anchor.glob(str(path.relative_to(path.anchor))) if p.is_file())
    unknown = [str(p) for p in files if _suffix(p) not in SUFFIXES]
    if unknown:
        raise UserError(
            f"{unknown[0]} is of no known kind; data.source takes {', '.join(SUFFIXES)}, each also with .gz"
        )
    if not files:
        raise UserError(f"data.source={config.source} holds no file that ends in {', '.join(SUFFIXES)} (also .gz)")
    named = [p for p in files if split in p.name.split(".")[0].replace("_", "-").split("-")]
    if not named and config.eval_split is None and config.train_split == "train":
        return files  # no file is called after a split: all of them are text to train on
    if not named:
        names = ", ".join(p.name for p in files[:10])
        raise UserError(
            f"no file of data.source={config.source} belongs to the split {split} (files: {names}); "
            f"name them like {split}.jsonl, or split one source by data.eval_fraction=0.2 and data.eval_split=null"
        )
    return named


@dataclass(frozen=True)
class LocalSource:
    """Documents from files on disk, read one at a time."""

    config: DataConfig
    files: dict[str, list[Path]]

    def identity(self) -> dict[str, Any]:
        return {split: [_sha256(path) for path in files] for split, files in self.files.items()}

    def texts(self, split: str) -> Iterator[str]:
        for path in self.files[split]:
            for where, record in read_records(path):
                yield text_of(record, self.config.text_column, self.config.text_separator, where)


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with the place it stands at ('FILE, line 7'); plain text comes as {None: text}."""
    try:
        match _suffix(path):
            case ".parquet":
                yield from _parquet(path)
            case ".csv":
                yield from _csv(path)
            case ".txt":
                yield from _paragraphs(path)
            case _:
                yield from _json(path)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None


def text_of(record: Any, column: str, separator: str, where: str) -> str:
    """The text of a record. `column` may be nested (answers.text); a list of texts is joined by `separator`."""
    plain = isinstance(record, dict) and None in record
    value = record[None] if plain else _pick(record, column, where, record)
    if value is None:
        return ""
    parts = value if isinstance(value, list) else [value]
    parts = ["" if part is None else part for part in parts]
    wrong = next((part for part in parts if not isinstance(part, str)), None)
    if wrong is not None:
        raise UserError(
            f"{where}: column {column} holds {type(wrong).__name__}, not text; choose another data.text_column"
        )
    text = separator.join(parts)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: column {column} holds half of a surrogate pair ({text[error.start]!r}), which is no character; "
            "repair or remove the record"
        ) from None
    return text


def columns_of(record: Any, prefix: str = "") -> list[str]:
    """Flattened names of a record's columns: {'answers': {'text': []}} gives ['answers.text']."""
    if isinstance(record, list):
        return columns_of(record[0], prefix) if record and isinstance(record[0], dict) else [prefix.rstrip(".")]
    if not isinstance(record, dict):
        return [prefix.rstrip(".")]
    return [name for key, value in record.items() for name in columns_of(value, f"{prefix}{key}.")]


def _pick(node: Any, column: str, where: str, record: Any) -> Any:
    if node is None:
        return None
    if isinstance(node, list):  # a list of answers, each with its text
        return [_pick(item, column, where, record) for item in node]
    if isinstance(node, dict):
        if column in node:
            return node[column]
        head, dot, rest = column.partition(".")
        if dot and head in node:
            return None if node[head] is None else _pick(node[head], rest, where, record)
    names = columns_of(record) if isinstance(record, dict) else []
    raise UserError(
        f"{where}: no column {column}{nearest(column, names)}; set data.text_column (there are: {', '.join(names)})"
    )


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of records, or one record a line; which of them, the first character tells."""
    lines = _lines(path)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        text = first[1] + "".join(line for _, line in lines)
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            line = error.lineno + first[0] - 1
            raise UserError(
                f"{path}, line {line}, column {error.colno}: broken JSON ({error.msg}); mend it there"
            ) from None
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))
        return
    for number, text in chain([first], lines):
        if text.strip():
            yield f"{path}, line {number}", _json_line(path, number, text)


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number}, column {error.colno}: broken JSON ({error.msg}); mend or remove that line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(
            f"{path}, line {number}: JSON that cannot be read ({error}); mend or remove that line"
        ) from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
    rows = csv.DictReader((line for _, line in _lines(path)), strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: broken CSV ({error}); mend it there") from None
        where = f"{path}, line {rows.line_num}"
        if None in row:
            raise UserError(f"{where}: more fields than the header names; quote the text that holds commas")
        yield where, row


def _paragraphs(path: Path) -> Iterator[tuple[str, Any]]:
    start, paragraph = 1, ""
    for number, line in _lines(path):
        if line.strip():
            start = start if paragraph else number
            paragraph += line
        elif paragraph:
            yield f"{path}, line {start}", {None: paragraph.strip("\r\n")}
            paragraph = ""
    if paragraph:
        yield f"{path}, line {start}", {None: paragraph.strip("\r\n")}


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", record
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole parquet file ({error}); fetch or write it again") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, decoded strictly, so that a wrong byte is named by its place."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    offset = 0
    with opener(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(codecs.BOM_UTF8):  # as Excel writes it; no part of the text
                raw, offset = raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                # 0x80 to 0x9f are quotes and dashes in Windows-1252, and invisible controls in Latin-1
                encoding = "windows-1252" if 0x80 <= raw[error.start] <= 0x9F else "latin1"
                encoding = (
                    "utf-16" if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else encoding
                )
                raise UserError(
                    f"{path}, line {number}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8; "
                    f"convert the file, e.g. iconv -f {encoding} -t utf-8"
                ) from None
            offset += len(raw)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None
