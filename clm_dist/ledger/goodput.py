"""Where the time of a run went: useful training over wall time, by cause."""

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
    "lost work": "steps that an interruption or a rewind took back, or whose update was withheld",
    "not running": "between the last row of a start and the next one's process",
}


def goodput(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by cause; they add up to the wall time from the first process's start to the last row.

    A row's time is when it was written: `seconds` of it went to what the row is of, the rest since the row before to
    something that has no rows.
    """
    seconds = dict.fromkeys(CAUSES, 0.0)
    lost = {id(row) for row, _ in history(rows).lost}
    clock: float | None = None  # up to when the time is accounted for
    rest = "other"
    for row in rows:
        event, took = row["event"], row.get("seconds", 0.0)
        if event == "start":
            # a process may begin while those of the start before are still leaving
            began = row["began"] if clock is None else max(clock, row["began"])
            seconds["not running"] += 0.0 if clock is None else began - clock
            clock, rest = began, "start-up"
        clock = row["time"] - took if clock is None else clock
        # the step that was given up has no row of its own
        seconds["lost work" if event == "rewind" else rest] += row["time"] - clock - took
        clock = row["time"]
        if event in ("step", "rewind"):
            rest = "other"
        if event != "step":
            seconds[event if event in seconds else "other"] += took
        elif id(row) in lost or not row["update"]:
            seconds["lost work"] += took
        else:
            seconds["training"] += took - row["data_seconds"]
            seconds["data"] += row["data_seconds"]
    return seconds


def table(seconds: dict[str, float]) -> str:
    """For people."""
    wall = sum(seconds.values())
    lines = [f"goodput {seconds['training'] / wall:.1%} of {wall:,.1f} s" if wall else "goodput: nothing has run"]
    for cause, took in seconds.items():
        meaning = f"   {MEANING[cause]}" if cause in MEANING else ""
        lines.append(f"  {cause:<12}{took:>12,.1f} s{took / wall if wall else 0:>8.1%}{meaning}")
    return "\n".join(lines)
