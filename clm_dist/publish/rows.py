"""Rows of metrics: metrics.jsonl, the truth, as training writes it; and what of it a destination has not been sent."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class MetricsFile:
    """metrics.jsonl: one JSON object a row, `step` and `time` first; the truth that every report is made from."""

    def __init__(self, path: Path) -> None:
        self.file: TextIO = path.open("a", encoding="utf-8", buffering=1)  # a line is on disk when it is logged

    def log(self, values: dict[str, float], step: int) -> None:
        """One row."""
        # a step without a finite loss is a row without a figure: JSON has no NaN
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")

    def finish(self) -> None:
        """No more rows."""
        self.file.close()


@dataclass
class Row:
    """All that was noted of one step: its figures, and texts that were generated then."""

    step: int
    time: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)  # train, eval, samples: what this row brings

    @property
    def figures(self) -> dict[str, float]:
        """Those that are numbers: a diverged step has rows without."""
        return {name: value for name, value in self.values.items() if value is not None}


def kinds(values: dict[str, Any]) -> set[str]:
    """What a row brings: figures of training, of an evaluation, or both."""
    return {name.partition("/")[0] for name in values} & {"train", "eval"}


class Unsent:
    """What a destination has not been sent: steps rise, and none comes twice.

    A resume cuts the files back to its checkpoint and computes the same steps again; those that were sent stay sent. So
    what counts is the newest step of each kind of row, not a place in a file.
    """

    def __init__(self, run: Path, sent: dict[str, int]) -> None:
        self.sent = sent
        self._metrics, self._samples = Tail(run / METRICS), Tail(run / SAMPLES)
        self._pending: dict[int, Row] = {}
        self._newest = -1

    def rows(self, ended: bool) -> list[Row]:
        """Rows that are whole, oldest first. A step is, when there is a later one (its evaluation comes after its loss),
        or when nothing more is written."""
        if self._metrics.is_cut() or self._samples.is_cut():
            self._metrics.rewind()
            self._samples.rewind()
            self._pending, self._newest = {}, -1
        for line in self._metrics.lines():
            step, moment = line.pop("step"), line.pop("time")
            self._newest = max(self._newest, step)
            for kind in kinds(line):
                if row := self._row(step, kind):
                    row.time, row.values = row.time or moment, {**row.values, **line}
        for sample in self._samples.lines():
            if row := self._row(sample["step"], "samples"):
                row.samples.append(sample)
        return [row for step, row in sorted(self._pending.items()) if ended or step < self._newest]

    def mark(self, row: Row) -> None:
        """The row was sent."""
        for kind in row.kinds:
            self.sent[kind] = row.step
        self._pending.pop(row.step, None)

    def _row(self, step: int, kind: str) -> Row | None:
        if step <= self.sent.get(kind, -1):
            return None
        row = self._pending.setdefault(step, Row(step))
        row.kinds.add(kind)
        return row


class Tail:
    """The lines of a growing file that are new since the last look; knows when it was cut back meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rewind()

    def rewind(self) -> None:
        """From the beginning again."""
        self._offset, self._last = 0, b""

    def is_cut(self) -> bool:
        """Whether what was read last no longer stands there."""
        if not self._offset:
            return False
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                return file.read(len(self._last)) != self._last
        except FileNotFoundError:
            return True

    def lines(self) -> Iterator[dict[str, Any]]:
        """Whole lines only: the last one may just be being written."""
        try:
            file: BinaryIO = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset, self._last = self._offset + len(line), line
                yield json.loads(line)


def waiting(run: Path, sent: dict[str, int]) -> str | None:
    """What of a run folder a destination lacks, in words; None: nothing."""
    rows = Unsent(run, dict(sent)).rows(ended=True)
    if not rows:
        return None
    steps = f"step {rows[0].step:,}" if len(rows) == 1 else f"steps {rows[0].step:,} to {rows[-1].step:,}"
    return f"{len(rows):,} rows have not arrived ({steps})"
