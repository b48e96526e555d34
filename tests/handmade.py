"""Checkpoints and runs made by hand, without training: what tests of what is on disk have in common."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from clm_dist.checkpoint import content, disk, folder, tensors
from clm_dist.data.order import blocks_at
from clm_dist.ledger.ledger import Ledger, digest_of, next_consumed, rewound

MODEL, OPTIMIZER, RANK = "model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors", "rank-00000.json"
FILES = [MODEL, OPTIMIZER, RANK, folder.STATE, folder.CONFIG, folder.MANIFEST, folder.MARK]
STATE = {"cursor": 0, "world_size": 1, "evaluated": -1, "evaluation": {}}


def save(place: Path, step: int, loss: float | None = None) -> None:
    """stage, write, commit. loss: of an evaluation at this very step."""
    folder.stage(place, step)
    staged = folder.staged_path(place, step)
    values = torch.arange(8.0) + step
    files = {
        MODEL: tensors.save(staged / MODEL, {"weight": values}),
        OPTIMIZER: tensors.save(staged / OPTIMIZER, {"exp_avg.weight": values / 2}),
        RANK: disk.write(staged / RANK, [folder.to_json(content.generators(torch.device("cpu")))]),
    }
    evaluated = {} if loss is None else {"evaluated": step, "evaluation": {"eval/loss": loss}}
    folder.commit(place, step, files, {**STATE, "step": step, **evaluated}, "seed: 42\n")


def newest(place: Path) -> int | None:
    """The step of the checkpoint that a start would take; None where there is none. Says why the others are passed over."""
    for one in folder.checkpoints(place):
        problem = one.problem()
        if problem is None:
            return one.state()["step"]
        assert isinstance(problem, str) and problem
    return None


def seal(path: Path) -> None:
    """Manifest and mark anew for whatever the files now hold: damage that the hashes do not show."""
    manifest = json.loads((path / folder.MANIFEST).read_text())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    mark(path, json.dumps(manifest).encode())


def mark(path: Path, manifest: bytes) -> None:
    """This manifest, with a mark that agrees."""
    (path / folder.MANIFEST).write_bytes(manifest)
    (path / folder.MARK).write_text(hashlib.sha256(manifest).hexdigest())


@dataclass(frozen=True)
class Moment:
    """Where a run is."""

    step: int = 0
    cursor: int = 0
    consumed: str = ""
    unlogged: int = 0  # steps since the last row of metrics


class Run:
    """Writes ledger and metrics as training does: 10 blocks, 4 a step, a row of metrics every second step."""

    PLAN = {"seed": 7, "num_blocks": 10, "global_batch_size": 4, "log_every": 2}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        self.path, self.now, self.metrics = path, Moment(), []
        self._ledger = None

    def start(self, at: Moment | None = None, **other) -> "Run":
        """A process begins, from a checkpoint of that moment."""
        self._back(at or self.now)
        self._ledger = Ledger(self.path / "ledger.jsonl")
        row = {"step": self.now.step, "cursor": self.now.cursor, "consumed": self.now.consumed, **other}
        self._ledger.write("start", began=0.0, plan=self.PLAN, **row)
        return self

    def steps(self, count: int, read=None, update: bool = True) -> "Run":
        """Optimizer steps. read: what is read, if not what the plan says."""
        for _ in range(count):
            step, start, end = self.now.step + 1, self.now.cursor, self.now.cursor + 4
            blocks = planned(start) if read is None else np.asarray(read(self.now))
            self.row(step, start, end, digest_of(blocks), update)
            if self.now.unlogged == 2 or step % 2 == 0:
                self.metrics.append({"step": step, "train/loss": 1.0, "train/steps": self.now.unlogged})
                self.now = replace(self.now, unlogged=0)
        return self

    def row(self, step: int, start: int, end: int, digest: int, update: bool = True) -> None:
        """One step in the ledger, whatever it says."""
        consumed = next_consumed(self.now.consumed, step, start, end, digest, update)
        values = {"step": step, "from": start, "to": end, "digest": digest, "update": update, "consumed": consumed}
        self._ledger.write("step", **values, seconds=0.1, data_seconds=0.01)
        self.now = Moment(step, end, consumed, self.now.unlogged + 1)

    def rewind(self, to: Moment) -> "Run":
        """Back to a checkpoint, and past the step that is not done any more."""
        cursor = self.now.cursor + 4
        self._back(to)
        consumed = rewound(to.consumed, to.step, cursor)
        self._ledger.write("rewind", step=to.step, cursor=cursor, cause="nan", consumed=consumed)
        self.now = replace(self.now, cursor=cursor, consumed=consumed)
        return self

    def evaluate(self) -> "Run":
        self.metrics.append({"step": self.now.step, "eval/loss": 1.0})
        return self

    def write_metrics(self) -> Path:
        with contextlib.closing((self.path / "metrics.jsonl").open("w")) as file:
            file.writelines(json.dumps(row) + "\n" for row in self.metrics)
        return self.path

    def _back(self, to: Moment) -> None:
        self.now = to
        self.metrics = [row for row in self.metrics if row["step"] <= to.step]


def planned(cursor: int) -> np.ndarray:
    return blocks_at(cursor, 4, Run.PLAN["num_blocks"], Run.PLAN["seed"])
