"""The steps that count: those of all starts, without what was lost to an interruption or taken back."""

from dataclasses import dataclass, field
from typing import Any

from clm_dist.ledger.ledger import next_consumed, rewound

Row = dict[str, Any]
# What of a start's plan decides what is learned, and the fields (by their beginning) that may change it
DECIDED_BY = {
    "seed": ("seed",),
    "num_blocks": ("data.",),
    "global_batch_size": ("train.global_batch_size",),
    "max_steps": ("train.", "data."),  # also by epochs, which the size of a step and of the data make steps of
}


@dataclass
class History:
    """What a run did in the end."""

    steps: list[Row] = field(default_factory=list)  # rows of the steps whose result is in the weights, in order
    lost: list[tuple[Row, str]] = field(
        default_factory=list
    )  # rows of steps that count no more; to a start or a rewind
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
    under: dict[tuple[int, str], Row] = field(default_factory=dict)  # by step and what was consumed: the start in force


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
    else:
        found.problems += _unmeant(found.under[step, row["consumed"]], row)
    found.starts.append(row)
    _drop(found, step, row["cursor"], "start")
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
    _drop(found, step, cursor, "rewind")
    found.rewinds += 1
    found.passed_over.append((cursor, row["cursor"]))
    _reach(found, row, row["cursor"])


def _reach(found: History, row: Row, cursor: int) -> None:
    found.now = (row["consumed"], cursor)
    found.reached.setdefault(row["step"], {})[row["consumed"]] = cursor
    if row["event"] == "start":  # it may change the plan of what comes; the state was reached under an earlier one
        found.under.setdefault((row["step"], row["consumed"]), row)
    elif found.starts:
        found.under[row["step"], row["consumed"]] = found.starts[-1]


def _unmeant(before: Row, row: Row) -> list[str]:
    """What a start changed without a word. before: the start under which the state was reached that it goes on from."""

    def values(start: Row) -> Row:
        return {name: start.get("plan", {}).get(name) for name in DECIDED_BY} | {"data": start.get("data")}

    old, new = values(before), values(row)
    fields = {**DECIDED_BY, "data": ("data.",)}
    return [
        f"a start at step {row['step']} changed {name} from {old[name]} to {new[name]}: train.resume_changes does not say so"
        for name in new
        if old[name] != new[name] and not any(one.startswith(fields[name]) for one in row.get("changes", []))
    ]


def _drop(found: History, step: int, cursor: int, cause: str) -> None:
    """Everything after `step` counts no more, nor data passed over after `cursor`, nor states that had passed it over."""
    found.lost += [(row, cause) for row in found.steps if row["step"] > step]
    found.steps = [row for row in found.steps if row["step"] <= step]
    found.reached = {number: states for number, states in found.reached.items() if number <= step}
    states = found.reached.get(step, {})
    found.reached[step] = {consumed: reached for consumed, reached in states.items() if reached <= cursor}
    found.passed_over = [part for part in found.passed_over if part[1] <= cursor]
