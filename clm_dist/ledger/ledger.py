"""RUN/ledger.jsonl: what was consumed, when, and by which start of the run. Only ever added to; each row seals those before.

Rows (one JSON object a line; times in seconds since 1970):
    start       a process group begins at `step`, `cursor`, with `plan`, `world_size`, `consumed`; `began`: the process
    step        an optimizer step read positions `from` to `to` - 1 of the stream of blocks
    evaluation, save, export    took `seconds` during which training stood still
    rewind      back at `step`, and on with the data at `cursor`
    end         finished, preempted, interrupted or failed; missing after a kill

`chain` of a row is a hash over it and the row before: none can be changed, taken out or put elsewhere unseen.
`consumed` is a hash over what was learned from alone: equal for a run that was interrupted and one that was not.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clm_dist.data.order import mix

DIGEST_MODULUS = 2**40  # the sum over thousands of ranks stays exact in fp64
TAIL = 2**16  # bytes that the file is read by from its end: the first of them hold the last row, but for a torn one
NEEDED: dict[str, set[str]] = {  # what a row of an event has beside its time
    "start": {"step", "cursor", "consumed", "plan", "began"},
    "step": {"step", "from", "to", "digest", "update", "consumed", "data_seconds"},
    "rewind": {"step", "cursor", "consumed"},
}
PLAN = {"seed", "num_blocks", "global_batch_size", "log_every"}  # and the plan of a start
COUNTS = {"step", "cursor", "from", "to", "digest"}  # whole numbers, wherever they stand
TIMES = {"time", "began", "seconds", "data_seconds"}


def block_digest(blocks: np.ndarray) -> np.ndarray:
    """40 well mixed bits for each block number: (n,) uint64."""
    return mix(blocks.astype(np.uint64)) >> np.uint64(24)


def digest_of(blocks: np.ndarray) -> int:
    """A check sum of block numbers, whatever their order: what each rank adds up for the blocks that it read."""
    return int(block_digest(blocks).sum(dtype=np.uint64)) % DIGEST_MODULUS


def next_consumed(previous: str, step: int, start: int, end: int, digest: int, update: bool) -> str:
    """The hash of all that was learned from, after one more step."""
    return _hash(f"{previous}{step}:{start}:{end}:{digest}:{update}")


def rewound(previous: str, step: int, cursor: int) -> str:
    """The same after going back to `step` and past the data before `cursor`. previous: that of `step`."""
    return _hash(f"{previous}rewind:{step}:{cursor}")


def chained(previous: str, row: dict[str, Any]) -> str:
    """The chain of a row. previous: that of the row before, or nothing."""
    return _hash(previous + json.dumps({key: row[key] for key in sorted(row) if key != "chain"}))


def first_chain(path: Path) -> str | None:
    """The chain of the first row, which no other run has; None where there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["chain"])
    except (OSError, ValueError, KeyError):
        return None


class Ledger:
    """The file, open for more rows. On the main process only."""

    def __init__(self, path: Path) -> None:
        _mend(path)
        self._chain = (last_row(path) or {}).get("chain", "")
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a row is the kernel's when it is written

    def write(self, event: str, **values: Any) -> None:
        """One row."""
        row = {"event": event, "time": round(time.time(), 3), **values}
        self._chain = chained(self._chain, row)
        self._file.write(json.dumps({**row, "chain": self._chain}) + "\n")

    def sync(self) -> None:
        """Forces it to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more rows."""
        self._file.close()


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest row, found from the end: however long the file is, it takes no longer. None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        line, _ = _last_line(file)
    try:
        row = json.loads(line) if line else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and what is wrong with the chain."""
    rows, problems, chain = [], [], ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                problems.append(f"ledger row {number} is half a row, as a kill may leave it; the next start removes it")
                break
            try:
                row = json.loads(line)
                if row["chain"] != chained(chain, row):
                    problems.append(f"ledger row {number} ({row['event']}) does not follow from the one before")
                chain = row["chain"]
                if _is_whole(row):
                    rows.append(row)
                else:
                    problems.append(f"ledger row {number} ({row['event']}) lacks what it needs")
            except (ValueError, KeyError, TypeError, AttributeError):
                problems.append(f"ledger row {number} is damaged")
                chain = ""  # as it was for whoever added the next one
    return rows, problems


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether all is there that others count with."""
    if not {"time"} | NEEDED.get(row["event"], set()) <= row.keys():
        return False
    if row["event"] == "start":
        plan = row["plan"]
        if not plan.keys() >= PLAN or not all(type(plan[name]) is int and plan[name] > 0 for name in PLAN - {"seed"}):
            return False
    whole = all(type(row[name]) is int for name in COUNTS & row.keys())
    return whole and all(isinstance(row[name], int | float) for name in TIMES & row.keys())


def _mend(path: Path) -> None:
    """Takes away half a row, which a kill may leave at the end, or what a power failure does."""
    if path.is_file():
        with path.open("rb+") as file:
            _, end = _last_line(file)
            file.truncate(end)


def _last_line(file: BinaryIO) -> tuple[bytes, int]:
    """The newest whole line, and where in the file it ends; nothing and 0 where there is none."""
    begin, tail = file.seek(0, os.SEEK_END), b""
    while begin and tail.count(b"\n") < 2:  # its own end, and that of the line before
        size = min(TAIL, begin)
        begin = file.seek(begin - size)
        tail = file.read(size) + tail
    end = tail.rfind(b"\n") + 1
    return tail[tail.rfind(b"\n", 0, max(0, end - 1)) + 1 : end], begin + end


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
