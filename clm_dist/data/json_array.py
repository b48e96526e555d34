"""The records of one JSON array, read without ever holding all of it."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from clm_dist.data.records import DAMAGED, Bad, wrong_byte

PIECE = 2**20  # bytes read at once


class JsonArray:
    """Elements of an array by `json`'s own decoder, one at a time, over a window of the text."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name = name
        self.number = 0  # of records so far
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self._before = 0  # bytes before the window
        self._damage: Exception | None = None  # where the file ends for us, told when all before it was read

    @property
    def byte(self) -> int:
        """Where the end of the window stands in the file."""
        return self._before + len(self._text.encode("utf-8"))

    def __iter__(self) -> Iterator[tuple[str, Any, int]]:
        """(place, record or `Bad`, characters it took). Nothing that follows broken JSON can be trusted to be a record."""
        try:
            self._to_text()
            self._at += 1  # the bracket, which the caller saw
            yield from self._elements()
        except _Broken as error:
            if isinstance(self._damage, UnicodeDecodeError):
                place = f"{self.name}, record {self.number + 1}, byte {self.byte}"
                yield "", Bad(place, f"{wrong_byte(self._damage)}; what follows it is not read"), 0
                return
            if self._damage is not None:
                raise self._damage from None
            problem, position = error.args
            byte = self._before + len(self._text[:position].encode("utf-8"))
            problem = f"broken JSON ({problem}), and what follows it is not read; mend it there"
            around = self._text[self._at : self._at + 1000]
            yield "", Bad(f"{self.name}, record {self.number + 1}, byte {byte}", problem, around), 0

    def _elements(self) -> Iterator[tuple[str, Any, int]]:
        decoder = json.JSONDecoder()
        while self._to_text() != "]":
            try:
                record, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # at the end of the window, or a text that runs on to it: perhaps only not read yet
                unfinished = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated")
                if unfinished and not self._ended:
                    self._more()
                    continue
                raise _Broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
                raise _Broken(str(error), self._at) from None
            if end == len(self._text) and not self._ended:
                self._more()
                continue  # 12 may have been the first half of 1234
            self.number += 1
            taken, self._at = end - self._at, end
            yield f"{self.name}, record {self.number}", record, taken
            following = self._to_text()
            if following not in (",", "]"):
                raise _Broken("no comma after a record", self._at)
            self._at += following == ","
        self._at += 1
        if self._to_text():
            raise _Broken("text after the array", self._at)

    def _to_text(self) -> str:
        """Goes past white space; returns the character there, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Reads on, at least as much as the window holds, so that a long record is not tried too often."""
        self._before += len(self._text[: self._at].encode("utf-8"))
        pieces, self._at = [self._text[self._at :]], 0
        wanted = max(PIECE, len(pieces[0]))
        while wanted > 0 and not self._ended:
            try:
                data = self._file.read1(PIECE)  # type: ignore[attr-defined]
                self._ended = not data
                wanted -= len(data)
                pieces.append(self._decoder.decode(data, final=self._ended))
            except UnicodeDecodeError as error:
                pieces.append(bytes(error.object[: error.start]).decode("utf-8"))
                self._damage, self._ended = error, True
            except DAMAGED as error:
                self._damage, self._ended = error, True
        self._text = "".join(pieces)
        return any(pieces[1:])


class _Broken(Exception):  # noqa: N818
    """(what is wrong, where in the window)."""
