"""Saving: every rank its share, at once or behind the back of training; the main process commits."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from clm_dist import recipe
from clm_dist.checkpoint import content, disk, folder, tensors
from clm_dist.config import Config
from clm_dist.engine.engine import Engine
from clm_dist.training.state import TrainState
from clm_dist.watch.watch import Watch

WRITERS = 4  # threads of a process that write while training waits
FILE_BYTES = 2**28  # about; larger shares are written as several files


class Saver:
    """Writes checkpoints of one run. Every rank has one and makes every call."""

    def __init__(self, accelerator: Accelerator, config: Config, engine: Engine, run: Path, watch: Watch) -> None:
        self.accelerator, self.config, self.engine, self.watch = accelerator, config, engine, watch
        self.folder = run / "checkpoints"
        self.newest = -1  # step of the newest committed checkpoint, as far as the main process knows
        self.problem: str | None = None  # why the last save failed; on the main process
        self._requested = -1
        self._error: Exception | None = None  # of this rank, in a thread
        self._thread: threading.Thread | None = None
        self._copies: dict[str, torch.Tensor] = {}
        # of its own, on the CPU: the writing threads meet here while training uses the other
        self._group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def save(self, state: TrainState, facts: dict[str, Any], wait: bool) -> None:
        """Saves the run as it is now. Every rank must call this. facts: more for state.json, on the main process.

        wait: until it is committed; else only until everything is copied.
        """
        self.wait()
        if state.step == self._requested:  # nothing has been learned since
            return
        self._requested = state.step
        began = time.monotonic()
        problem = self._try(folder.stage, self.folder, state.step) if self.accelerator.is_main_process else None
        self.watch.at("waiting for the others")
        self.accelerator.wait_for_everyone()
        self.watch.at("saving")
        mine = self.engine.held()
        if not wait or self.accelerator.device.type != "cpu":
            mine = {kind: self._copied(kind, held) for kind, held in mine.items()}
        generators = content.generators(self.accelerator.device)
        document = {**state.to_json(), "world_size": self.accelerator.num_processes, "format": folder.FORMAT, **facts}
        if (scaler := self.engine.scaler_state()) is not None:
            document["scaler"] = scaler
        work = (state, mine, generators, document, began, problem, wait)
        if wait:
            self._write(*work)
            self.check()
            return
        self._thread = threading.Thread(target=self._write, args=work, name="save")
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way is done. Every rank must call this."""
        if self._thread is not None:
            self.watch.at("waiting for the disk")
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises here what went wrong in a thread, if it was not the disk."""
        if self._error is not None:
            raise self._error

    def restored(self, step: int) -> None:
        """The run is now that of this checkpoint."""
        self.wait()
        self.newest = self._requested = step

    def forget(self) -> None:
        """The state of the newest step is to be saved again."""
        self._requested = -1

    def _write(
        self,
        state: TrainState,
        mine: dict[str, dict[str, torch.Tensor]],
        generators: dict[str, Any],
        document: dict[str, Any],
        began: float,
        problem: str | None,
        waited_for: bool,
    ) -> None:
        """This rank's files, then, on the main process, the commit. In a thread, or in the main one."""
        files: dict[str, dict[str, Any]] = {}
        try:
            problem = problem or self._try(self._write_share, document["step"], mine, generators, files, waited_for)
        except Exception as error:  # not the disk: this rank is at fault, and the others must not wait for it
            self._error = error
            problem = f"{type(error).__name__}: {error}"
        try:
            records = self._records(files, problem)
            if self.accelerator.is_main_process:
                self._commit(document["step"], records, document)
                state.save_seconds = time.monotonic() - began
        except Exception as error:  # of a thread, it would be heard by nobody
            self._error = self._error or error

    def _write_share(
        self,
        step: int,
        mine: dict[str, dict[str, torch.Tensor]],
        generators: dict[str, Any],
        files: dict[str, dict[str, Any]],
        waited_for: bool,
    ) -> None:
        """Fills `files` with what was written."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        staged = folder.staged_path(self.folder, step)
        parts = [
            (f"{kind}-{rank + 1:05d}-of-{world_size:05d}{ending}.safetensors", part)
            for kind, held in mine.items()
            for ending, part in content.parts(held, FILE_BYTES)
        ]
        # hashing is what takes the processor: on several cores while training stands still, on one beside it
        with ThreadPoolExecutor(WRITERS if waited_for else 1) as pool:
            files.update(pool.map(lambda one: (one[0], tensors.save(staged / one[0], one[1])), parts))
        name = f"rank-{rank:05d}.json"
        files[name] = disk.write(staged / name, [folder.to_json(generators)])

    def _records(self, files: dict[str, dict[str, Any]], problem: str | None) -> list[Any]:
        """What every rank has written, on the main process. Every rank must call this."""
        if self._group is None:
            return [(files, problem)]
        records: list[Any] = [None] * self.accelerator.num_processes
        to = records if self.accelerator.is_main_process else None
        dist.gather_object((files, problem), to, group=self._group)
        return records

    def _commit(self, step: int, records: list[Any], document: dict[str, Any]) -> None:
        """Makes it a checkpoint if every rank has written, and takes away what need not be kept."""
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(records) if problem]
        if not problems:
            files = {name: written for part, _ in records for name, written in part.items()}
            problem = self._try(folder.commit, self.folder, step, files, document, recipe.dump(self.config))
            problems = [problem] if problem else []
        if problems:
            self.problem = f"checkpoint of step {step} failed: {'; '.join(problems)}"
            self._try(folder.clear, self.folder)
            return
        self.problem, self.newest = None, step
        keep = self.config.checkpoint
        self._try(folder.rotate, self.folder, keep.keep_last, keep.keep_every, keep.keep_best)

    def _copied(self, kind: str, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in memory that training leaves alone; the same memory at every save."""
        pin = self.accelerator.device.type == "cuda"
        for name, tensor in held.items():
            key = f"{kind}/{name}"
            if key not in self._copies:
                self._copies[key] = torch.empty_like(tensor, device="cpu", pin_memory=pin)
            self._copies[key].copy_(tensor.detach(), non_blocking=True)
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return {name: self._copies[f"{kind}/{name}"] for name in held}

    @staticmethod
    def _try(function: Any, *arguments: Any) -> str | None:
        """What goes wrong with the disk is said, and training goes on: the last good checkpoint is still there."""
        try:
            function(*arguments)
        except OSError as error:
            return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
        return None
