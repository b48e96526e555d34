"""Records in chunks: what a worker of `prepare` is given, and how it becomes texts.

A chunk is a run of records that stand together in a file, about CHUNK_BYTES of it. Where chunks part depends on the
contents of the file alone, never on who reads it. JSON lines go as the bytes they are, of a plain file only their
place, so that parsing is the workers' part; other formats are taken apart by the one who reads the file.
"""

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from clm_dist.errors import UserError, nearest

DAMAGED = (gzip.BadGzipFile, zlib.error, EOFError)  # what reading a broken .gz file raises
CHUNK_BYTES = 4 * 2**20  # some 0.7 M tokens: a fraction of a second's work, a few dozen MB while it is worked on


@dataclass(frozen=True)
class Bad:
    """What stands in the place of a record that cannot be used."""

    place: str  # "FILE, line 7, byte 123"
    problem: str  # what is wrong, and what to do
    record: str = ""  # what stands there

    def error(self) -> UserError:
        """The message for `data.on_error=stop`."""
        return UserError(f"{self.place}: {self.problem}")


class BadRecordError(Exception):
    """A record that cannot be used; the message is a `Bad`'s problem."""


@dataclass(frozen=True)
class Values:
    """Records one by one, each with its place; a `Bad` where one cannot be read."""

    items: list[tuple[str, Any]]

    def records(self) -> Iterator[tuple[Any, Any]]:
        """(place, record)."""
        return iter(self.items)

    def bad(self, place: Any, record: Any, problem: str) -> Bad:
        """The record as a bad one."""
        return Bad(place, problem, _as_text(record))


@dataclass(frozen=True)
class Tables:
    """Records as the Arrow batches of a columnar file."""

    name: str
    batches: list[Any]  # pyarrow.RecordBatch
    first: int  # number of the first record, from 1

    def records(self) -> Iterator[tuple[Any, Any]]:
        """(number, record)."""
        number = self.first
        for batch in self.batches:
            for record in batch.to_pylist():
                yield number, record
                number += 1

    def bad(self, place: Any, record: Any, problem: str) -> Bad:
        """The record as a bad one."""
        return Bad(f"{self.name}, record {place}", problem, _as_text(record))

    def __reduce__(self) -> tuple[Any, ...]:
        """Through a pipe as Arrow's own messages: a pickled slice takes all of the table with it that it is a slice of."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batches[0].schema) as stream:
            for batch in self.batches:
                stream.write_batch(batch)
        return _received_tables, (self.name, sink.getvalue().to_pybytes(), self.first)


@dataclass(frozen=True)
class Lines:
    """JSON records, one a line.

    data: the lines. Without it, those of a plain file that begin in the piece of CHUNK_BYTES from `start`; a line is read
    to its end, however far that is.
    """

    path: str
    start: int  # of the lines (or the piece), in bytes of the unpacked file
    data: bytes | None = field(default=None, repr=False)
    first_line: int | None = None  # None: counted when a message needs it

    def records(self) -> Iterator[tuple[Any, Any]]:
        """(number of the line in the chunk, record or `Bad`)."""
        _, data = self._lines()
        lines: Any  # of str, or of bytes
        try:
            lines = data.decode("utf-8").split("\n")
        except UnicodeDecodeError:
            lines = data.split(b"\n")  # one by one, to find the place
        for number, line in enumerate(lines):
            if line and not line.isspace():
                yield number, self._record(number, line)

    def bad(self, place: Any, record: Any, problem: str, at: int = 0) -> Bad:
        """The record as a bad one. at: the byte of its line at which it goes wrong."""
        lines, starts, first = self._places
        text = lines[place].decode("utf-8", errors="backslashreplace")
        return Bad(f"{self.path}, line {first + place}, byte {starts[place] + at}", problem, text)

    @cached_property
    def _places(self) -> tuple[list[bytes], list[int], int]:
        """The lines, where each begins in the file, and the number of the first: once, however many are bad."""
        offset, data = self._lines()
        lines = data.split(b"\n")
        starts = list(accumulate((len(line) + 1 for line in lines), initial=offset))
        first = _count_newlines(self.path, offset) + 1 if self.first_line is None else self.first_line
        return lines, starts, first

    def _record(self, number: int, line: str | bytes) -> Any:
        try:
            text = line if isinstance(line, str) else line.decode("utf-8")
            return json.loads(text)
        except UnicodeDecodeError as error:
            return self.bad(number, None, wrong_byte(error), error.start)
        except json.JSONDecodeError as error:
            problem = f"broken JSON in column {error.colno} ({error.msg}); mend or remove that line"
            return self.bad(number, None, problem, len(text[: error.pos].encode("utf-8")))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
            return self.bad(number, None, f"JSON that cannot be read ({error}); mend or remove that line")

    def _lines(self) -> tuple[int, bytes]:
        """Where the lines begin, and they."""
        if self.data is not None:
            return self.start, self.data
        try:
            file = Path(self.path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}; it was there before") from None
        with file:
            begin = self.start
            if begin:  # a line that began before belongs to the piece before
                file.seek(begin - 1)
                before = file.readline(CHUNK_BYTES + 1)
                if not before.endswith(b"\n"):
                    return begin, b""  # it goes on beyond this piece
                begin += len(before) - 1
            data = file.read(max(0, self.start + CHUNK_BYTES - begin))
            if data and not data.endswith(b"\n"):
                data += file.readline()
            if begin == 0 and data.startswith(BOM_UTF8):  # as Excel writes it: no part of the text
                return 3, data[3:]
            return begin, data


def _received_tables(name: str, messages: bytes, first: int) -> Tables:
    import pyarrow as pa

    return Tables(name, list(pa.ipc.open_stream(messages)), first)


Chunk = Lines | Values | Tables


def texts_of(
    chunk: Chunk, column: str, separator: str, refuse: Callable[[str], None] | None = None
) -> Iterator[str | Bad]:
    """The text of each record of a chunk, or why there is none. refuse: raises BadRecordError for a text of no use."""
    for place, record in chunk.records():
        if isinstance(record, Bad):
            yield record
            continue
        try:
            text = text_of(record, column, separator)
            if refuse is not None:
                refuse(text)
            yield text
        except BadRecordError as error:
            yield chunk.bad(place, record, str(error))


def text_of(record: Any, column: str, separator: str) -> str:
    """The text of a record. `column` may be nested (answers.text); a list of texts is joined by `separator`."""
    plain = isinstance(record, dict) and None in record  # a paragraph of plain text
    value = record[None] if plain else _pick(record, column) if isinstance(record, dict) else _MISSING
    if value is _MISSING:
        names = columns_of(record) if isinstance(record, dict) else []
        raise BadRecordError(
            f"no column {column}{nearest(column, names)}; set data.text_column (there are: {', '.join(names)})"
        )
    if value is None:
        return ""
    parts: list[Any] = value if isinstance(value, list) else [value]
    parts = ["" if part is None else part for part in parts]
    wrong = next((part for part in parts if not isinstance(part, str)), None)
    if wrong is not None:
        raise BadRecordError(f"column {column} holds {type(wrong).__name__}, not text; choose another data.text_column")
    text = separator.join(parts)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"column {column} holds half of a surrogate pair ({text[error.start]!r}), which is no character; "
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


def wrong_byte(error: UnicodeDecodeError) -> str:
    """What to do about bytes that are not UTF-8."""
    byte = error.object[error.start]
    # 0x80 to 0x9f are quotes and dashes in Windows-1252, and invisible controls in Latin-1
    encoding = "windows-1252" if 0x80 <= byte <= 0x9F else "latin1"
    if error.object.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    return f"byte 0x{byte:02x} is not UTF-8; convert the file, e.g. iconv -f {encoding} -t utf-8"


_MISSING = object()


def _pick(node: Any, column: str) -> Any:
    """What stands at a dotted name; a list where it goes through one, _MISSING where there is nothing."""
    if node is None:
        return None
    if isinstance(node, list):  # a list of answers, each with its text
        found = [_pick(item, column) for item in node]
        return _MISSING if any(one is _MISSING for one in found) else found
    if isinstance(node, dict):
        if column in node:
            return node[column]
        head, dot, rest = column.partition(".")
        if dot and head in node:
            return None if node[head] is None else _pick(node[head], rest)
    return _MISSING


def _as_text(record: Any) -> str:
    return record if isinstance(record, str) else json.dumps(record, ensure_ascii=False, default=str)


def _count_newlines(path: str, end: int) -> int:
    count = 0
    with Path(path).open("rb") as file:
        while end > 0 and (piece := file.read(min(end, 2**20))):
            count += piece.count(b"\n")
            end -= len(piece)
    return count
