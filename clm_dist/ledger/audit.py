"""What a run's ledger proves: every block seen exactly as often as planned, metrics without gaps, checkpoints whole."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from clm_dist.data.order import permute
from clm_dist.ledger.history import History, Row, history
from clm_dist.ledger.ledger import DIGEST_MODULUS, block_digest, read

PIECE = 2**20  # blocks looked at together: few enough for memory, so many that counting them is not what takes time
SHOWN = 5  # of problems that are alike


@dataclass
class Audit:
    """What holds, and what does not."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def audit(
    run: Path,
    checkpoints: Sequence[tuple[str, str | None]] = (),
    checkpoint_states: dict[int, str] | None = None,
) -> Audit:
    """Examines a run folder. checkpoints: name and problem of each. checkpoint_states: what the whole ones had consumed, by
    step."""
    rows, problems = read(run / "ledger.jsonl")
    found = Audit(problems=problems)
    if not problems:
        found.lines.append(f"ledger: {len(rows):,} rows, each sealed by the next")
    past = history(rows)
    found.problems += past.problems
    if not past.starts:
        found.problems.append("the ledger holds no start")
        return found
    _check_blocks(past, found)
    _check_end(past, rows[-1], found)
    _check_metrics(run / "metrics.jsonl", past, rows[-1], found)
    found.problems += [f"checkpoint {name}: {problem}" for name, problem in checkpoints if problem]
    for step, consumed in (checkpoint_states or {}).items():
        if consumed not in past.reached.get(step, {}):
            found.problems.append(f"the checkpoint of step {step} learned from other blocks than the ledger has")
    found.lines.append(f"checkpoints: {sum(problem is None for _, problem in checkpoints)} whole, their hashes reread")
    return found


def blocks_of(positions: np.ndarray, num_blocks: int, seed: int) -> np.ndarray:
    """The blocks at any positions of the endless stream: (n,) int64."""
    epochs, within = np.divmod(positions.astype(np.uint64), np.uint64(num_blocks))
    return permute(within, num_blocks, seed, epochs).astype(np.int64)


def planned_counts(parts: Iterable[tuple[int, int]], num_blocks: int, seed: int) -> np.ndarray:
    """How often each block stands in parts of the stream, each from `first` to `last` - 1: (num_blocks,).

    A whole pass has each once, whatever its order; only what a part begins and ends within is looked up.
    """
    counts = np.zeros(num_blocks, dtype=np.int64)
    for first, last in parts:
        begin, end = -(-first // num_blocks), last // num_blocks  # the passes that are whole
        counts += max(0, end - begin)
        ends = [(first, begin * num_blocks), (end * num_blocks, last)] if begin <= end else [(first, last)]
        for start, stop in ends:
            for piece in range(start, stop, PIECE):
                blocks = blocks_of(np.arange(piece, min(piece + PIECE, stop)), num_blocks, seed)
                counts += np.bincount(blocks, minlength=num_blocks)
    return counts


def _check_blocks(past: History, found: Audit) -> None:
    """Digest of every step, and how often each block was seen, against the plan: the pure function of order.py.

    A start may have changed the plan, where that was meant: each part of the run is held against its own.
    """
    said, problems = [], []
    for (seed, num_blocks), rows in groupby(past.steps, lambda row: _order_of(past, row)):
        steps = list(rows)
        counts, wrong_steps = _counts(steps, past, seed, num_blocks)
        problems += wrong_steps
        begin, end = steps[0]["from"], steps[-1]["to"]
        out = [part for part in sorted(past.passed_over) if begin <= part[0] and part[1] <= end]
        parts = zip([begin, *(last for _, last in out)], [*(first for first, _ in out), end], strict=True)
        if wrong := int((counts != planned_counts(parts, num_blocks, seed)).sum()):
            found.problems.append(f"{wrong} of {num_blocks} blocks were not seen as often as planned")
        said.append(f"{counts.sum():,} blocks: each of {num_blocks:,} blocks {_times(counts)}")
    found.problems += problems[:SHOWN]
    if len(problems) > SHOWN:
        found.problems.append(f"{len(problems) - SHOWN:,} more steps read what the plan does not say")
    if not found.problems:
        skipped = sum(not row["update"] for row in past.steps)
        left_out = sum(last - first for first, last in past.passed_over)
        read_blocks = "; then ".join(said) or "nothing"
        restarts = sum(cause == "start" for _, cause in past.lost)
        found.lines += [
            f"data: {len(past.steps):,} steps in {len(past.starts)} starts read {read_blocks}, as planned",
            f"{len(past.lost):,} steps were done again ({restarts:,} after restarts, {len(past.lost) - restarts:,} after "
            f"rewinds), {skipped} updates withheld, {left_out} blocks passed over in {past.rewinds} rewinds",
        ]


def _order_of(past: History, row: Row) -> tuple[int, int]:
    plan = past.plans[id(row)]
    return plan["seed"], plan["num_blocks"]


def _times(counts: np.ndarray) -> str:
    least, most = counts.min(), counts.max()
    if least == most:
        return f"{least:,} times"
    return f"{least:,} {'or' if most == least + 1 else 'to'} {most:,} times"


def _counts(steps: list[Row], past: History, seed: int, num_blocks: int) -> tuple[np.ndarray, list[str]]:
    """How often each block was seen, (num_blocks,): by the plan, and by the digest of each step, which says so. And where
    it does not."""
    counts, problems, fit = np.zeros(num_blocks, dtype=np.int64), [], []
    for row in steps:
        size, planned = row["to"] - row["from"], past.plans[id(row)]["global_batch_size"]
        if size == planned and row["from"] >= 0:
            fit.append(row)
        else:
            problems.append(f"step {row['step']} read {size} blocks, not a global batch")
    together = max(1, PIECE // max((row["to"] - row["from"] for row in fit), default=1))
    for some in (fit[number : number + together] for number in range(0, len(fit), together)):
        sizes = np.array([row["to"] - row["from"] for row in some])
        ends = np.cumsum(sizes)
        shifts = np.array([row["from"] for row in some]) - (ends - sizes)  # from a place in this piece to the stream
        blocks = blocks_of(np.arange(ends[-1]) + np.repeat(shifts, sizes), num_blocks, seed)
        counts += np.bincount(blocks, minlength=num_blocks)
        digests = np.add.reduceat(block_digest(blocks), ends - sizes) % np.uint64(DIGEST_MODULUS)
        problems += [
            f"step {row['step']}: the blocks that were read are not those of the plan"
            for row, digest in zip(some, digests.tolist(), strict=True)
            if digest != row["digest"]
        ]
    return counts, problems


def _check_end(past: History, newest: Row, found: Audit) -> None:
    """A run is finished with its last step, not before and not after."""
    step, most = past.steps[-1]["step"] if past.steps else past.first, past.starts[-1]["plan"].get("max_steps", 0)
    if most and step > most:
        found.problems.append(f"the ledger goes up to step {step}, beyond the {most} of the plan")
    if most > step and newest.get("state") == "finished":
        found.problems.append(f"the ledger says finished at step {step} of {most}")


def _check_metrics(path: Path, past: History, newest_row: Row, found: Audit) -> None:
    """Training rows follow each other without gap or overlap; each evaluation stands once."""
    rows, problems = _metrics_rows(path)
    before = past.first
    training = [row for row in rows if "train/loss" in row]
    for row in training:
        start = row["step"] - row["train/steps"]
        forked = before == past.first > 0  # the first row may reach back into the run that this one went on from
        if row["step"] <= before or (start != before and not (forked and start < before)):
            covered = f"steps {start + 1} to {row['step']}"
            problems.append(f"metrics: a row covers {covered}, the one before ended at step {before}")
        before = row["step"]
    evaluated = [row["step"] for row in rows if "eval/loss" in row]
    if evaluated != sorted(set(evaluated)):
        problems.append("metrics: an evaluation stands twice, or out of order")
    newest = past.steps[-1]["step"] if past.steps else past.first
    if (beyond := max([before, *evaluated])) > newest:
        problems.append(f"metrics go up to step {beyond}, the ledger to {newest}")
    # a step stands in the ledger first: one killed in between has no row of metrics yet
    logged = past.steps[:-1] if past.steps and past.steps[-1] is newest_row else past.steps
    if before < max((row["step"] for row in logged if _is_logged(row["step"], past.plans[id(row)])), default=0):
        problems.append(f"metrics end at step {before}, the ledger at {newest}")
    found.problems += problems
    if not problems:
        found.lines.append(
            f"metrics: {len(training):,} training rows without gap, {len(evaluated)} evaluations, none twice"
        )


def _is_logged(step: int, plan: Row) -> bool:
    return step % plan["log_every"] == 0 or step == plan.get("max_steps")


def _metrics_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows with whole numbers where they are counted by, and which are none."""
    rows, problems = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
            counted = [row["step"], row["train/steps"]] if "train/loss" in row else [row["step"]]
            if not all(type(count) is int for count in counted):
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            problems.append(f"metrics row {number} is damaged")
    return rows, problems
