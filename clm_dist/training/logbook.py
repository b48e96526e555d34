"""The run's ledger as training writes it: on the main process; the hash of what was consumed on every rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from clm_dist.config import Config
from clm_dist.ledger.ledger import DIGEST_MODULUS, Ledger, next_consumed, rewound
from clm_dist.training.job import Job
from clm_dist.training.state import TrainState


class Logbook:
    """Every rank has one and makes every call; only that of the main process writes."""

    def __init__(self, accelerator: Accelerator, config: Config, job: Job, run: Path) -> None:
        self.accelerator, self.config, self.job = accelerator, config, job
        self.path = run / "ledger.jsonl"
        self.ledger: Ledger | None = None
        self.step_seconds = 0.0  # of the newest step
        self._digest, self.data_seconds = 0, 0.0  # of the newest step
        self._since = time.monotonic()

    def start(self, state: TrainState, began: float) -> None:
        """This start of the run goes on from `state`."""
        plan = self.job.plan
        if self.accelerator.is_main_process:
            self.ledger = Ledger(self.path)
        self._write(
            "start",
            began=began,
            step=state.step,
            cursor=state.cursor,
            consumed=state.consumed,
            world_size=plan.world_size,
            plan={
                "seed": self.config.seed,
                "num_blocks": plan.num_blocks,
                "global_batch_size": plan.global_batch_size,
                "max_steps": plan.max_steps,
                "log_every": self.config.train.log_every,
            },
            data=self.job.data_sha256,
            changes=list(self.config.train.resume_changes),
        )
        self.mark()

    def mark(self) -> None:
        """The next step begins."""
        self._since = time.monotonic()

    def read(self, digest: int, data_seconds: float) -> None:
        """What all ranks together read for the step under way, and how long this one waited for it."""
        self._digest, self.data_seconds = digest % DIGEST_MODULUS, data_seconds

    def step(self, state: TrainState, start: int, update: bool) -> str:
        """A step is done; returns the new hash of what was consumed. start: the cursor before it."""
        self.step_seconds = time.monotonic() - self._since
        consumed = next_consumed(state.consumed, state.step, start, state.cursor, self._digest, update)
        self._write(
            "step",
            step=state.step,
            **{"from": start, "to": state.cursor},
            digest=self._digest,
            update=update,
            seconds=round(self.step_seconds, 6),
            data_seconds=round(self.data_seconds, 6),
            consumed=consumed,
        )
        return consumed

    def rewind(self, state: TrainState, cause: str) -> str:
        """Back at `state.step`, with the data going on at `state.cursor`; returns the new hash of what was consumed."""
        consumed = rewound(state.consumed, state.step, state.cursor)
        self._write("rewind", step=state.step, cursor=state.cursor, cause=cause, consumed=consumed)
        self.mark()
        return consumed

    @contextmanager
    def timed(self, event: str, step: int) -> Iterator[None]:
        """What happens inside is no training."""
        began = time.monotonic()
        yield
        self._write(event, step=step, seconds=round(time.monotonic() - began, 6))

    def end(self, step: int, state: str) -> None:
        """This start of the run is over: finished, preempted, interrupted or failed."""
        self._write("end", step=step, state=state)
        self.sync()

    def sync(self) -> None:
        """Forced to disk."""
        if self.ledger is not None:
            self.ledger.sync()

    def _write(self, event: str, **values: object) -> None:
        if self.ledger is not None:
            self.ledger.write(event, **values)
