"""The steps that count: those of all starts, without what was lost to an interruption or taken back."""

from dataclasses import dataclass, field
from typing import Any

from clm_dist.ledger.ledger import next_consumed, rewound

Row = dict[str, Any]


@dataclass
class History:
    """What a run did in the end."""

    steps: list[Row] = field(default_factory=list)  # rows of the steps whose result is in the weights, in order
    lost: list[Row] = field(default_factory=list)  # rows of steps that were done again, or taken back
    passed_over: list[tuple[int, int]] = field(default_factory=list)  # positions of the stream left out by a rewind
    starts: list[Row] = field(default_factory=list)
    plans: dict[int, Row] = field(default_factory=dict)  # the plan that each row of a step (its id) was done by
    rewinds: int = 0
    first: int = 0  # the step at which it began; more than 0 for a run that goes on from another's checkpoint
    problems: list[str] = field(default_factory=list)
    # what was consumed after each number of steps that was reached and still counts, and the cursor there. Several where
    # a rewind went on with other data: the checkpoint of before may be gone back to again
    reached: dict[int, dict[str, int]] = field(default_factory=dict)
    now: tuple[str, int] = ("", 0)  # the newest of these


def history(rows: list[Row]) -> History:
    """Walks through the rows as the run did."""
    found = History()
    for row in rows:
        if row["event"] == "start":
            _start(found, row)
        elif row["event"] == "step":
            _step(found, row)
        elif row["event"] == "rewind":
            _rewind(found, row)
    return found


def _start(found: History, row: Row) -> None:
    step = row["step"]
    if not found.starts:
        found.first = step
    elif found.reached.get(step, {}).get(row["consumed"]) != row["cursor"]:
        found.problems.append(f"a start at step {step} goes on from what this run never was")
    found.starts.append(row)
    _drop(found, step, row["cursor"])
    _reach(found, row, row["cursor"])


def _step(found: History, row: Row) -> None:
    step, (consumed, cursor) = row["step"], found.now
    before = found.steps[-1]["step"] if found.steps else found.first
    if before != step - 1:
        found.problems.append(f"step {step} follows upon step {before}")
    elif row["from"] != cursor:
        found.problems.append(f"step {step} reads from position {row['from']}, step {before} ended at {cursor}")
    if row["consumed"] != next_consumed(consumed, step, row["from"], row["to"], row["digest"], row["update"]):
        found.problems.append(f"step {step}: its hash of what was consumed is not that of the steps before it")
    found.steps.append(row)
    if found.starts:
        found.plans[id(row)] = found.starts[-1].get("plan", {})
    _reach(found, row, row["to"])


def _rewind(found: History, row: Row) -> None:
    step = row["step"]
    states = found.reached.get(step, {})
    before = [
        cursor for consumed, cursor in states.items() if rewound(consumed, step, row["cursor"]) == row["consumed"]
    ]
    if not before:
        found.problems.append(f"a rewind goes back to step {step}, which this run never reached so")
    cursor = before[0] if before else row["cursor"]
    _drop(found, step, cursor)
    found.rewinds += 1
    found.passed_over.append((cursor, row["cursor"]))
    _reach(found, row, row["cursor"])


def _reach(found: History, row: Row, cursor: int) -> None:
    found.now = (row["consumed"], cursor)
    found.reached.setdefault(row["step"], {})[row["consumed"]] = cursor


def _drop(found: History, step: int, cursor: int) -> None:
    """Everything after `step` counts no more, nor data passed over after `cursor`."""
    found.lost += [row for row in found.steps if row["step"] > step]
    found.steps = [row for row in found.steps if row["step"] <= step]
    found.reached = {number: states for number, states in found.reached.items() if number <= step}
    found.passed_over = [part for part in found.passed_over if part[1] <= cursor]
