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
from typing import Any

import numpy as np

from clm_dist.data.order import mix

DIGEST_MODULUS = 2**40  # the sum over thousands of ranks stays exact in fp64
TAIL = 2**16  # bytes at the end of the file that surely hold its last row
NEEDED: dict[str, set[str]] = {  # what a row of an event has beside its time
    "start": {"step", "cursor", "consumed", "plan", "began"},
    "step": {"step", "from", "to", "digest", "update", "consumed", "data_seconds"},
    "rewind": {"step", "cursor", "consumed"},
}
PLAN = {"seed", "num_blocks", "global_batch_size", "log_every"}  # and the plan of a start


def digest_of(blocks: np.ndarray) -> int:
    """A check sum of block numbers, whatever their order: what each rank adds up for the blocks that it read."""
    return int((mix(blocks.astype(np.uint64)) >> np.uint64(24)).sum(dtype=np.uint64)) % DIGEST_MODULUS


def next_consumed(previous: str, step: int, start: int, end: int, digest: int, update: bool) -> str:
    """The hash of all that was learned from, after one more step."""
    return _hash(f"{previous}{step}:{start}:{end}:{digest}:{update}")


def rewound(previous: str, step: int, cursor: int) -> str:
    """The same after going back to `step` and past the data before `cursor`. previous: that of `step`."""
    return _hash(f"{previous}rewind:{step}:{cursor}")


def chained(previous: str, row: dict[str, Any]) -> str:
    """The chain of a row. previous: that of the row before, or nothing."""
    return _hash(previous + json.dumps({key: row[key] for key in sorted(row) if key != "chain"}))


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


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest row, found from the end: however long the file is, it takes no longer. None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().splitlines()
    try:
        row = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and what is wrong with the chain."""
    rows, problems, chain = [], [], ""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
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
    return rows, problems


def _is_whole(row: dict[str, Any]) -> bool:
    needed = {"time"} | NEEDED.get(row["event"], set())
    return needed <= row.keys() and (row["event"] != "start" or row["plan"].keys() >= PLAN)


def _mend(path: Path) -> None:
    """Takes away half a row, which a kill may leave at the end."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        begin = max(0, path.stat().st_size - TAIL)
        file.seek(begin)
        tail = file.read()
        file.truncate(begin + tail.rfind(b"\n") + 1)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
