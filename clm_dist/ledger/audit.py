"""What a run's ledger proves: every block seen exactly as often as planned, metrics without gaps, checkpoints whole."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.data.order import blocks_at
from clm_dist.ledger.history import History, history
from clm_dist.ledger.ledger import digest_of, read


@dataclass
class Audit:
    """What holds, and what does not."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def audit(run: Path, checkpoints: Sequence[tuple[str, str | None]] = (), states: dict[int, str] | None = None) -> Audit:
    """Examines a run folder. checkpoints: name and problem of each. states: `consumed` of the whole ones by step."""
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
    _check_metrics(run / "metrics.jsonl", past, found)
    found.problems += [f"checkpoint {name}: {problem}" for name, problem in checkpoints if problem]
    for step, consumed in (states or {}).items():
        if consumed not in past.reached.get(step, {}):
            found.problems.append(f"the checkpoint of step {step} learned from other blocks than the ledger has")
    found.lines.append(f"checkpoints: {sum(problem is None for _, problem in checkpoints)} whole, their hashes reread")
    return found


def _check_blocks(past: History, found: Audit) -> None:
    """Digest of every step, and how often each block was seen, against the plan: the pure function of order.py.

    A start may have changed the plan, where that was meant: each part of the run is held against its own.
    """
    said = []
    for (seed, num_blocks), rows in groupby(past.steps, lambda row: _order_of(past, row)):
        steps = list(rows)
        counts = _counts(steps, past, found, seed, num_blocks)
        begin, end = steps[0]["from"], steps[-1]["to"]
        out = [part for part in sorted(past.passed_over) if begin <= part[0] and part[1] <= end]
        planned = np.zeros(num_blocks, dtype=np.int64)
        for first, last in zip([begin, *(last for _, last in out)], [*(first for first, _ in out), end], strict=True):
            planned += np.bincount(blocks_at(first, max(0, last - first), num_blocks, seed), minlength=num_blocks)
        if wrong := int((counts != planned).sum()):
            found.problems.append(f"{wrong} of {num_blocks} blocks were not seen as often as planned")
        often = f"{counts.min()} times" if counts.min() == counts.max() else f"{counts.min()} or {counts.max()} times"
        said.append(f"{counts.sum():,} blocks, each of {num_blocks:,} {often}")
    if not found.problems:
        skipped = sum(not row["update"] for row in past.steps)
        left_out = sum(last - first for first, last in past.passed_over)
        read_blocks = "; then ".join(said) or "nothing"
        found.lines += [
            f"data: {len(past.steps):,} steps in {len(past.starts)} starts read {read_blocks}, as planned",
            f"{len(past.lost):,} steps were done again, {skipped} updates withheld, {left_out} blocks passed over in "
            f"{past.rewinds} rewinds",
        ]


def _order_of(past: History, row: dict[str, Any]) -> tuple[int, int]:
    plan = past.plans[id(row)]
    return plan["seed"], plan["num_blocks"]


def _counts(steps: list[dict[str, Any]], past: History, found: Audit, seed: int, num_blocks: int) -> np.ndarray:
    """How often each block was seen, (num_blocks,); the digest of each step says that it was these."""
    counts = np.zeros(num_blocks, dtype=np.int64)
    for row in steps:
        size = row["to"] - row["from"]
        blocks = blocks_at(row["from"], size, num_blocks, seed)
        if size != past.plans[id(row)]["global_batch_size"]:
            found.problems.append(f"step {row['step']} read {size} blocks, not a global batch")
        if digest_of(blocks) != row["digest"]:
            found.problems.append(f"step {row['step']}: the blocks that were read are not those of the plan")
        counts += np.bincount(blocks, minlength=num_blocks)
    return counts


def _check_metrics(path: Path, past: History, found: Audit) -> None:
    """Training rows follow each other without gap or overlap; each evaluation stands once."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            problems.append(f"metrics row {number} is damaged")
    before = past.first
    training = [row for row in rows if "train/loss" in row]
    for row in training:
        start = row["step"] - row["train/steps"]
        forked = before == past.first > 0  # the first row may reach back into the run that this one went on from
        if start != before and not (forked and start < before):
            covered = f"steps {start + 1} to {row['step']}"
            problems.append(f"metrics: a row covers {covered}, the one before ended at step {before}")
        before = row["step"]
    newest = past.steps[-1]["step"] if past.steps else past.first
    if before > newest:
        problems.append(f"metrics go up to step {before}, the ledger to {newest}")
    if newest - before >= past.starts[-1]["plan"]["log_every"]:
        problems.append(f"metrics end at step {before}, the ledger at {newest}")
    evaluated = [row["step"] for row in rows if "eval/loss" in row]
    if evaluated != sorted(set(evaluated)):
        problems.append("metrics: an evaluation stands twice, or out of order")
    found.problems += problems
    if not problems:
        found.lines.append(
            f"metrics: {len(training):,} training rows without gap, {len(evaluated)} evaluations, none twice"
        )
