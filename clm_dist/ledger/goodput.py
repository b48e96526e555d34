"""Where the time of a run went: useful training over wall time, by cause."""

from itertools import pairwise
from typing import Any

from clm_dist.ledger.history import history

CAUSES = (
    *("training", "data", "evaluation", "save", "export", "start-up", "lost work", "not running", "other"),
)  # fmt: skip
MEANING = {
    "training": "steps whose result is in the weights",
    "data": "waiting for blocks, in these steps",
    "save": "training stood still for a checkpoint",
    "start-up": "from a process's start to its first step",
    "lost work": "steps that an interruption or a rewind took back",
    "not running": "between the last row of a start and the next one's process",
}


def goodput(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by cause; they add up to the wall time from the first process's start to the last row."""
    seconds = dict.fromkeys(CAUSES, 0.0)
    if not rows:
        return seconds
    lost = {id(row) for row in history(rows).lost}
    starts = [number for number, row in enumerate(rows) if row["event"] == "start"]
    for begin, end in pairwise([*starts, len(rows)]):
        attempt = rows[begin:end]
        seconds["start-up"] += max(0.0, attempt[0]["time"] - attempt[0]["began"])
        accounted = 0.0
        for row in attempt[1:]:
            took = row.get("seconds", 0.0)
            accounted += took
            if row["event"] != "step":
                seconds[row["event"] if row["event"] in seconds else "other"] += took
            elif id(row) in lost:
                seconds["lost work"] += took
            else:
                seconds["training"] += took - row["data_seconds"]
                seconds["data"] += row["data_seconds"]
        seconds["other"] += max(0.0, attempt[-1]["time"] - attempt[0]["time"] - accounted)
        if end < len(rows):
            seconds["not running"] += max(0.0, rows[end]["began"] - attempt[-1]["time"])
    return seconds


def table(seconds: dict[str, float]) -> str:
    """For people."""
    wall = sum(seconds.values())
    lines = [f"goodput {seconds['training'] / wall:.1%} of {wall:,.1f} s" if wall else "goodput: nothing has run"]
    for cause, took in seconds.items():
        meaning = f"   {MEANING[cause]}" if cause in MEANING else ""
        lines.append(f"  {cause:<12}{took:>12,.1f} s{took / wall if wall else 0:>8.1%}{meaning}")
    return "\n".join(lines)
