"""Local files, cut into chunks of records: .json, .jsonl, .csv, .txt, .parquet, each also with .gz.

What is damaged never raises: a `Bad` stands in its place, and `data.on_error` decides. A file that cannot be opened does.
"""

import codecs
import csv
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from clm_dist.data.json_array import JsonArray
from clm_dist.data.records import CHUNK_BYTES, DAMAGED, Bad, Chunk, Lines, Tables, Values, wrong_byte
from clm_dist.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".parquet")
ROWS_PER_BATCH = 256  # of a columnar file at once: a row may hold a book
Item = tuple[str, Any, int]  # place, record or Bad, bytes of the file it took


@dataclass(frozen=True)
class LocalFile:
    """One file of documents."""

    path: Path
    sha256: str  # of the file as it is on disk
    column: str  # the text column: others need not travel
    stamp: tuple[int, int]  # size and time of the last change when it was hashed

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)

    @property
    def key(self) -> str:
        """The contents and how they are read, whatever the file is called."""
        packed = ".gz" if self.path.suffix == ".gz" else ""
        return f"{kind(self.path)}{packed}:{self.sha256}"

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.stamp[0]

    def check_unchanged(self) -> None:
        """UserError where the file is not what was hashed any more."""
        if stamp_of(self.path) != self.stamp:
            raise UserError(f"{self.path} changed while it was read; leave it alone and run the same command again")

    def num_chunks(self) -> int | None:
        """How many chunks there are, where that can be told without reading the file."""
        if self.path.suffix in (".json", ".jsonl") and not self._is_array:
            return -(-self.stamp[0] // CHUNK_BYTES)
        return None

    def chunks(self, first: int = 0) -> Iterator[Chunk]:
        """The chunks in order, from number `first` on. Those before are read past where they must be."""
        number = self.num_chunks()
        if number is not None:
            for start in range(first * CHUNK_BYTES, number * CHUNK_BYTES, CHUNK_BYTES):
                yield Lines(self.name, start)
            return
        for number, chunk in enumerate(self._chunks()):
            if number >= first:
                yield chunk

    def _chunks(self) -> Iterator[Chunk]:
        with reading(self.path):
            match kind(self.path):
                case "parquet":
                    yield from _parquet(self.path, self.column)
                case "csv":
                    yield from _gathered(_csv(self.path))
                case "txt":
                    yield from _gathered(_paragraphs(self.path))
                case _ if self._is_array:
                    yield from _gathered(_array(self.path))
                case _:
                    yield from _packed_lines(self.path)

    @cached_property
    def _is_array(self) -> bool:
        """Whether this is one JSON array rather than a record a line: the first character tells."""
        try:
            with reading(self.path), _open(self.path) as file:
                head = file.read(64).removeprefix(codecs.BOM_UTF8)
                while head.isspace():
                    head = file.read(2**16)
        except DAMAGED:
            return False
        return head.lstrip()[:1] == b"["


def kind(path: Path) -> str:
    """'json', 'csv', 'txt' or 'parquet': how a file is read, from its name."""
    return suffix(path).removeprefix(".").replace("jsonl", "json")


def suffix(path: Path) -> str:
    """The ending that says what the file is, .gz aside."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def stamp_of(path: Path) -> tuple[int, int]:
    """What changes when a file does: its size and the time of the last change."""
    with reading(path):
        found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A file that cannot be opened or read at all is named, with the system's reason."""
    try:
        yield
    except DAMAGED:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _damaged(path: Path, error: Exception, byte: int) -> Bad:
    problem = f"not a whole gzip file ({error}); fetch or compress it again"
    return Bad(f"{path}, byte {byte} of its unpacked contents", problem)


def _gathered(items: Iterator[Item]) -> Iterator[Values]:
    """Records in chunks of about CHUNK_BYTES."""
    held: list[tuple[str, Any]] = []
    size = 0
    for place, record, taken in items:
        held.append((place, record))
        size += taken
        if size >= CHUNK_BYTES:
            yield Values(held)
            held, size = [], 0
    if held:
        yield Values(held)


def _packed_lines(path: Path) -> Iterator[Chunk]:
    """JSON lines of a packed file, which can be read from its start only."""
    start, first_line, held, searched = 0, 1, bytearray(), 0
    with _open(path) as file:
        try:
            if file.peek(3).startswith(codecs.BOM_UTF8):  # type: ignore[attr-defined]
                start = len(file.read(3))
            while data := file.read1(2**16):  # type: ignore[attr-defined]  # of what precedes damage nothing is lost
                held += data
                while len(held) >= CHUNK_BYTES:
                    # by the contents alone, not by how much a reading gave, which differs between versions of Python
                    end = held.rfind(b"\n", 0, CHUNK_BYTES) + 1 if not searched else 0
                    end = end or held.find(b"\n", max(CHUNK_BYTES, searched)) + 1
                    searched = 0 if end else len(held)  # a line of gigabytes is not searched again and again
                    if not end:
                        break
                    yield Lines(str(path), start, bytes(held[:end]), first_line)
                    start, first_line = start + end, first_line + held.count(b"\n", 0, end)
                    del held[:end]
        except DAMAGED as error:
            end = held.rfind(b"\n") + 1
            yield Lines(str(path), start, bytes(held[:end]), first_line)
            yield Values([("", _damaged(path, error, start + len(held)))])
            return
    if held:
        yield Lines(str(path), start, bytes(held), first_line)


def _array(path: Path) -> Iterator[Item]:
    with _open(path) as file:
        array = JsonArray(str(path), file)
        try:
            yield from array
        except DAMAGED as error:
            yield "", _damaged(path, error, array.byte), 0


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of each line."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, offset = line[3:], 3
            yield number, offset, line
            offset += len(line)


def _csv(path: Path) -> Iterator[Item]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long document
    wrong: dict[int, Bad] = {}  # lines that are not UTF-8
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for number, offset, line in _lines(path):
            end = offset + len(line)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                text = line.decode("utf-8", errors="backslashreplace")
                wrong[number] = Bad(f"{path}, line {number}, byte {offset + error.start}", wrong_byte(error), text)
                yield text

    rows = csv.DictReader(lines(), strict=True)
    while True:
        try:
            _ = rows.fieldnames  # reads the header, the first time
            begin = end
            row: Any = next(rows)
            if None in row:
                problem = "more fields than the header names; quote the text that holds commas"
                row = Bad(f"{path}, line {rows.line_num}, byte {begin}", problem, str(row))
        except StopIteration:
            return
        except csv.Error as error:
            row = Bad(f"{path}, line {rows.line_num}, byte {begin}", f"broken CSV ({error}); mend it there")
        except DAMAGED as error:
            yield "", _damaged(path, error, end), 0
            return
        if wrong:
            row = wrong.pop(min(wrong))
            wrong.clear()
        yield f"{path}, line {rows.line_num}", row, end - begin


def _paragraphs(path: Path) -> Iterator[Item]:
    """Documents of plain text: what stands between blank lines."""
    held: list[bytes] = []
    first = begin = end = 0
    try:
        for number, offset, line in _lines(path):
            end = offset + len(line)
            if line.strip():
                if not held:
                    first, begin = number, offset
                held.append(line)
            elif held:
                yield _paragraph(path, first, begin, b"".join(held))
                held = []
    except DAMAGED as error:
        if held:
            yield _paragraph(path, first, begin, b"".join(held))
        yield "", _damaged(path, error, end), 0
        return
    if held:
        yield _paragraph(path, first, begin, b"".join(held))


def _paragraph(path: Path, first: int, begin: int, data: bytes) -> Item:
    try:
        return f"{path}, line {first}", {None: data.decode("utf-8").strip("\r\n")}, len(data)
    except UnicodeDecodeError as error:
        line = first + data[: error.start].count(b"\n")
        text = data.decode("utf-8", errors="backslashreplace")
        return "", Bad(f"{path}, line {line}, byte {begin + error.start}", wrong_byte(error), text), len(data)


def _parquet(path: Path, column: str) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held: list[Any] = []
    first, number, size = 1, 1, 0
    try:
        with _open(path) as file:
            table = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)  # else all of the column is held
            top = column.split(".")[0]
            only = [top] if top in table.schema_arrow.names and column not in table.schema_arrow.names else None
            only = [column] if column in table.schema_arrow.names else only
            for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=only):
                held.append(batch)
                number += len(batch)
                size += batch.nbytes
                if size >= CHUNK_BYTES:
                    yield Tables(str(path), held, first)
                    held, first, size = [], number, 0
    except (pa.ArrowException, OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system; pyarrow's own say that a page is broken
        if held:
            yield Tables(str(path), held, first)
        problem = f"not a whole parquet file ({' '.join(str(error).split())}); fetch or write it again"
        yield Values([("", Bad(f"{path}, record {number}", problem))])
        return
    if held:
        yield Tables(str(path), held, first)
