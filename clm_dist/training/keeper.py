"""What makes a run survive: its state restored and saved, its numbers agreed on, its way written down.

The loop asks it what to do about a step; everything that can go wrong between two steps is dealt with here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from clm_dist.checkpoint import content
from clm_dist.checkpoint.folder import Checkpoint, newest_whole
from clm_dist.config import Config
from clm_dist.data.order import step_seed
from clm_dist.engine.engine import Engine
from clm_dist.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, RunEnded, RunError, UserError
from clm_dist.training import offence, run_folder
from clm_dist.training.agreement import Agreement, Sums
from clm_dist.training.batches import Batches
from clm_dist.training.compare import compare_ranks
from clm_dist.training.health import Verdict, judge, remember
from clm_dist.training.job import Job
from clm_dist.training.logbook import Logbook
from clm_dist.training.resume import choose, other_base, settle
from clm_dist.training.saver import Saver
from clm_dist.training.state import TrainState
from clm_dist.training.time_limit import time_limit
from clm_dist.versions import versions
from clm_dist.watch.watch import STOP_FILE, Watch

REWINDS = 5  # to one checkpoint; more mean that the data is not what is wrong
OVERFLOWS = 50  # in a row: from the first scale of 2**16 they lead to 2**-34


class Keeper:
    """Of one run. Every rank has one and makes every call; the main process writes."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        job: Job,
        engine: Engine,
        watch: Watch,
        base_sha256: str | None = None,
    ) -> None:
        self.accelerator, self.config, self.job, self.watch = accelerator, config, job, watch
        self.base_sha256 = base_sha256  # of weights that checkpoints leave out, if any; on the main process
        self.engine = engine
        self.run = Path(config.run_dir)
        self.state = TrainState()
        self.tracker_ids: dict[str, str] = {}
        self.agreement = Agreement(accelerator, watch)
        self.saver = Saver(accelerator, config, engine, self.run, watch)
        self.logbook = Logbook(accelerator, config, job, self.run)
        self._rewinds: dict[int, int] = {}
        self._overflows = 0  # updates left out in a row
        self._told: str | None = None  # the newest problem of a save that the screen has shown
        self._limit = time_limit(config.train.stop_after, watch.began) if accelerator.is_main_process else float("inf")

    @property
    def leaving(self) -> bool:
        """Whether all ranks agreed to stop."""
        return self.agreement.stop

    def restore(self) -> None:
        """Goes on from the newest checkpoint that verifies, or begins. Every rank must call this."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            choice = choose(self.config, self.job.data_sha256, reread=True, begin_anew=self.job.overwrite)
            found = [choice.checkpoint, other_base(self.config, choice.checkpoint, self.base_sha256)]
            for line in choice.lines():
                self.say(line)
        checkpoint, problem = broadcast_object_list(found)
        if problem is not None:
            raise UserError(problem)
        self._seed_generators()
        saved = self._load(checkpoint) if checkpoint is not None else {}
        self.tracker_ids = saved.get("trackers", {})
        if self.accelerator.is_main_process:
            for line in settle(self.config, self.job, self.accelerator, checkpoint, saved):
                self.say(line)
        self.accelerator.wait_for_everyone()
        self.logbook.start(self.state, self.watch.began)
        self.watch.enter("training", self.state.step)
        self.watch.deadline = self._deadline
        self.watch.may_leave = False  # from now on there is something to lose
        policies = (self.config.train.on_nonfinite, self.config.train.on_spike)
        if checkpoint is None and "rewind" in policies:
            self._save(wait=True)  # there has to be something to go back to

    def sum_up(self, nll: torch.Tensor, grad_norm: torch.Tensor, batches: Batches) -> Sums:
        """A step's numbers, summed over all ranks; nobody waits for them yet. Every rank must call this.

        nll: this rank's summed nats of the step.
        """
        # under a scaler gradients overflow now and then by design, and it sees to that itself
        bad = (~torch.isfinite(grad_norm)).double() if not self.engine.scales else 0.0
        return self.agreement.start(nll, bad, batches.digest)

    def update_ahead(self, sums: Sums) -> bool:
        """Updates before anybody has seen the step's numbers, where the update itself can leave out one that is not
        finite: a GPU has that to do while the CPU reads and goes on. Returns whether it did. Every rank must call this."""
        if not self.engine.guards or self.config.train.on_spike != "ignore":
            return False
        total, bad_ranks, _ = sums.on_device
        self.engine.step_unless(~torch.isfinite(total) | (bad_ranks > 0))
        return True

    def verdict(self, sums: Sums, nll: torch.Tensor, batches: Batches, tokens: int) -> str:
        """What to do about a step, the same on all ranks: update, skip or rewind. Every rank must call this; the step's only
        sync.

        tokens: scored tokens of all ranks.
        """
        total, bad_ranks, digest = self.agreement.read(sums)
        self.logbook.read(int(digest), batches.seconds)
        loss = total / tokens
        found = judge(loss, bad_ranks == 0, self.state.losses, self.config.train)
        if found.action == "update":
            remember(self.state.losses, loss)
            self.state.nll += total
            self.state.tokens += tokens
        else:
            self._deal_with(found, nll)
        return found.action

    def advance(self, verdict: str) -> None:
        """A step is done. Every rank must call this."""
        state, start = self.state, self.state.cursor
        state.step, state.steps = state.step + 1, state.steps + 1
        state.cursor += self.job.plan.global_batch_size
        overflowed = self.engine.overflowed
        state.consumed = self.logbook.step(state, start, verdict == "update" and not overflowed)
        self.watch.step = state.step
        self._overflows = self._overflows + 1 if overflowed else 0
        if self._overflows >= OVERFLOWS:
            raise RunError(
                f"fp16: gradients overflowed in {OVERFLOWS} steps one after the other, although the loss scale was halved "
                "each time; they are not finite at any scale: set train.mixed_precision=bf16, or lower optim.lr"
            )

    def after_step(self, lr: float) -> None:
        """Compares and saves where that is due. Every rank must call this."""
        step, state = self.state.step, self.state
        if step % self.config.train.compare_ranks_every == 0:
            compare_ranks(self.accelerator, self.engine.replicas(), lr, state.cursor)
        if step % self.config.checkpoint.save_every == 0 and not self.leaving:
            self._save(wait=not self.config.checkpoint.asynchronous)
        self.saver.check()
        self._tell_problem()
        self.logbook.mark()

    def end(self, close: Callable[[], None]) -> None:
        """The last save; leaves where that was asked for. Every rank must call this. close: what to do before that."""
        self._save_surely()
        if self.leaving:
            close()
            code = EXIT_INTERRUPTED if self.agreement.interrupted else EXIT_PREEMPTED
            self.logbook.end(self.state.step, "interrupted" if self.agreement.interrupted else "preempted")
            (self.run / STOP_FILE).unlink(missing_ok=True)
            reason = self.watch.reason or "another process's wish"
            message = f"stopped by {reason}; saved at step {self.state.step:,}, the same command goes on from there"
            raise RunEnded(message if self.accelerator.is_main_process else None, code)
        self.watch.let_leave()

    def say(self, line: str) -> None:
        """A line on the screen, once."""
        if self.accelerator.is_main_process:
            print(line, flush=True)

    def _deal_with(self, found: Verdict, nll: torch.Tensor) -> None:
        """Keeps the offending batch, and stops or goes back where the recipe says so. Every rank must call this."""
        step = self.state.step + 1
        cause = offence.keep(self.accelerator, self.config, self.engine, self.state, self.job.plan, nll, found.cause)
        what = f"step {step}: {cause}"
        self.say(f"{what}; {found.action}; kept: `clm-dist replay {self.run} {step}`")
        if found.action == "stop":
            self._save_surely()
            self.logbook.end(self.state.step, "failed")
            raise RunError(
                f"{what}; saved before it. `clm-dist replay {self.run} {step}` shows it; train.on_nonfinite and "
                "train.on_spike (skip, rewind) say how to go on"
            )
        if found.action == "rewind":
            self._rewind(found.cause)

    def _rewind(self, cause: str) -> None:
        """Back to the last good checkpoint, and past the data up to here. Every rank must call this."""
        self.saver.wait()
        cursor = self.state.cursor + self.job.plan.global_batch_size
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            found = [newest_whole(self.saver.folder)]
        [checkpoint] = broadcast_object_list(found)
        if checkpoint is None:
            raise RunError(f"{cause}, and there is no checkpoint to go back to")
        saved = self._load(checkpoint)
        self._rewinds[self.state.step] = self._rewinds.get(self.state.step, 0) + 1
        if self._rewinds[self.state.step] > REWINDS:
            raise RunError(
                f"{cause}; went back to step {self.state.step} {REWINDS} times already: the data is not the cause"
            )
        if self.accelerator.is_main_process:
            run_folder.cut(self.config.run_dir, saved["files"])
        self.state.cursor = cursor
        self.state.consumed = self.logbook.rewind(self.state, cause)
        self.watch.step = self.state.step
        self.say(f"back to step {self.state.step:,}; the data goes on at block {cursor:,} of the stream")
        self.saver.forget()  # the same step with another cursor is another state

    def _load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Becomes what was saved; returns state.json. Every rank must call this."""
        saved = checkpoint.state()
        self.engine.load(content.read(checkpoint, "model"), content.read(checkpoint, "optimizer"))
        self.state.restore(saved)
        accelerator = self.accelerator
        if saved["world_size"] == accelerator.num_processes:
            content.load_generators(checkpoint, accelerator.process_index, accelerator.device)
        if "scaler" in saved:
            self.engine.load_scaler_state(saved["scaler"])
        self.saver.restored(self.state.step)
        self.say(
            f"resumed at step {self.state.step:,} from {checkpoint.path} "
            f"({saved['world_size']} processes then, {accelerator.num_processes} now)"
        )
        return saved

    def _seed_generators(self) -> None:
        """For models that draw numbers of their own: each rank others, at every start the same. (Dropout has no state.)"""
        seed = step_seed(self.config.seed, self.state.step, self.accelerator.process_index)
        content.seed_generators(seed)

    def _save(self, wait: bool) -> None:
        """One checkpoint. Every rank must call this."""
        facts: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            self.logbook.sync()
            facts = {
                "data": self.job.data_sha256,
                "files": run_folder.lengths(self.config.run_dir),
                "trackers": self.tracker_ids,
                "resumed_from": self.config.train.resume,
                "versions": versions(),
                "base_sha256": self.base_sha256,
            }
        with self.watch.during("saving"), self.logbook.timed("save", self.state.step):
            self.saver.save(self.state, facts, wait)

    def _save_surely(self) -> None:
        """A checkpoint of now, or a RunError on all ranks. Every rank must call this."""
        self.saver.wait()
        if self._any_problem():
            self._tell_problem()
            self.saver.forget()
        self._save(wait=True)
        if self._any_problem():
            last = f"the newest good one is of step {self.saver.newest}" if self.saver.newest >= 0 else "there is none"
            raise RunError(f"{self.saver.problem or 'the checkpoint failed'}; {last}")

    def _any_problem(self) -> bool:
        return self.agreement.sum(float(self.saver.problem is not None))[0] > 0

    def _tell_problem(self) -> None:
        problem = self.saver.problem
        if problem is not None and problem != self._told:
            self.say(f"{problem}; training goes on, older checkpoints are kept")
            self._told = problem

    def _deadline(self) -> float:
        """By when to ask for a stop (monotonic): what the newest save took, twice, and two steps, before the limit."""
        return self._limit - 2 * self.state.save_seconds - 2 * self.logbook.step_seconds - 1
