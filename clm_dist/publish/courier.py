"""What leaves a run goes by courier: a process of its own for each destination, so that nothing that hangs, hangs training.

The run folder is the outbox. A courier reads it, delivers, and notes in RUN/outbox/NAME.json what has arrived. Here is the
side of the training process, which starts couriers and, at its very end, waits for them for a bounded time. What the
process does stands in `delivery.py`.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from clm_dist.config import Config
from clm_dist.errors import UserError
from clm_dist.publish import outbox

# What a launcher tells its processes, and what they are to write for it: none of a courier's business.
OF_THE_LAUNCHER = re.compile(
    r"(RANK|WORLD_SIZE|CLM_DIST_OUTCOME|OMP_NUM_THREADS|OMPI_.*|PMI_.*|PET_.*|MASTER_.*|LOCAL_.*|GROUP_.*|ROLE_.*|"
    r"CROSS_.*|TORCHELASTIC_.*|TORCH_NCCL_.*|ACCELERATE_.*|DS_.*|FSDP_.*)$"
)
FOLLOWED = "CLM_DIST_FOLLOWED"  # in the environment of a courier: the process that it follows
HOPELESS = 1.0  # seconds that training waits for a courier whose destination did not answer before


class OfflineError(Exception):
    """Nothing is sent now, and trying again would not help: a later `clm-dist sync` delivers."""


class Destination(Protocol):
    """Where something of a run goes. Making one is cheap and talks to nobody."""

    name: str
    ended: str | None  # set by the courier once training writes nothing more: finished, preempted, ..., gone (killed)

    def deliver(self) -> bool:
        """Sends what waits, or a part of it; True: nothing is left. Exceptions are told once, and it is tried again."""
        ...

    def close(self) -> None:
        """Waits until all that was sent has arrived."""
        ...

    def missing(self) -> str | None:
        """What of the run folder has not arrived, in words, from the notes alone; None: all has."""
        ...


# name -> where its factory stands: module:function(run: Path, config: Config) -> Destination
DESTINATIONS = {
    "wandb": "clm_dist.publish.weights_biases:WeightsAndBiases",
    "tensorboard": "clm_dist.publish.boards:TensorBoard",
    "trackio": "clm_dist.publish.boards:Trackio",
    "mlflow": "clm_dist.publish.boards:MLflow",
    "hub": "clm_dist.publish.hub:Hub",
}

EXTRAS = ("wandb", "tensorboard", "trackio", "mlflow")  # of the package, and what they install has the same names


def destinations(config: Config) -> list[str]:
    """Where a run's recipe has it go, in the recipe's order."""
    return [*dict.fromkeys(config.track.trackers), *(["hub"] if config.publish.hub.repo is not None else [])]


def patience(name: str, config: Config) -> float:
    """Seconds that training waits for a destination at its very end."""
    return config.publish.hub.wait_seconds if name == "hub" else config.track.wait_seconds


def check_installed(names: Iterable[str]) -> None:
    """Refuses a dashboard whose package is missing, before anything starts."""
    for name in names:
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"track.trackers names {name}, which is not installed; run `pip install clm-dist[{name}]` or leave it out"
            )


def make_destination(name: str, run: Path, config: Config) -> Destination:
    """The destination itself; its libraries are imported here."""
    module, _, factory = DESTINATIONS[name].partition(":")
    made: Destination = getattr(importlib.import_module(module), factory)(run, config)
    return made


class Couriers:
    """Those of one start of a run. On the main process."""

    def __init__(self, run: Path, config: Config, say: Callable[[str], None]) -> None:
        self.run, self.config, self.say = run, config, say
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: dict[str, int] = {}
        self._told: set[str] = set()
        self._goes_on = "training goes on, "

    def start(self, names: Sequence[str]) -> None:
        """One process for each. A courier that cannot be started is told; training goes on."""
        for name in names:
            try:
                self._seen[name] = self._changed(name)  # what an earlier courier noted was told then
                self._processes[name] = _spawn(self.run, name)
            except OSError as error:
                self._tell(name, f"its courier could not be started ({error})")

    def look(self) -> None:
        """Shows what couriers have to say, once. Cheap: one look at a file's time for each."""
        for name in self._processes:
            try:
                changed = self._changed(name)
                if self._seen.get(name) == changed:
                    continue
                self._seen[name] = changed
                problem = outbox.notes(self.run, name).get("problem")
            except (OSError, ValueError):
                continue
            if problem:
                self._tell(name, str(problem))

    def end(self, reason: str, limit: float = float("inf")) -> None:
        """Nothing more will be written: waits for each, at most its patience and `limit`, and says what is missing."""
        began, self._goes_on = time.monotonic(), ""
        seconds = {name: min(patience(name, self.config), limit) for name in self._processes}
        for name, process in self._processes.items():
            _tell_end(process, f"{reason} {seconds[name]:.1f}\n")
        for name, process in self._processes.items():
            while process.poll() is None and time.monotonic() - began < self._bound(name, seconds[name]):
                time.sleep(outbox.LOOK_EVERY / 4)
        self.look()
        for name, process in self._processes.items():
            code = process.poll()
            if code != 0:
                why = (
                    f"not all has arrived after {time.monotonic() - began:.0f} s" if code is None else "not all arrived"
                )
                self.say(f"{name}: {why}; `clm-dist sync {self.run}` delivers the rest, now or later")
        self._processes.clear()

    def _changed(self, name: str) -> int:
        path = self.run / outbox.FOLDER / f"{name}.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def _bound(self, name: str, seconds: float) -> float:
        try:
            return min(HOPELESS, seconds) if outbox.notes(self.run, name).get("problem") else seconds
        except (OSError, ValueError):
            return min(HOPELESS, seconds)

    def _tell(self, name: str, problem: str) -> None:
        line = f"{name}: {problem}; {self._goes_on}what is missing waits in {self.run} (`clm-dist sync` delivers it)"
        if line not in self._told:
            self._told.add(line)
            self.say(line)


def courier_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a courier inherits: keys and proxies, nothing of the launcher's."""
    return {name: value for name, value in environment.items() if not OF_THE_LAUNCHER.match(name)}


def _spawn(run: Path, name: str) -> "subprocess.Popen[bytes]":
    """A session of its own, so that signals to the job's group do not end it before its time; it bounds that time itself.

    Its standard input ends when this process does, however that happens: that is how a courier knows.
    """
    with (run / outbox.FOLDER / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "clm_dist", "sync", str(run.resolve()), "--only", name, "--follow"],
            stdin=subprocess.PIPE,
            stdout=log,  # never ours: whoever reads our output would wait for the courier's end
            stderr=log,
            env=courier_environment(os.environ) | {FOLLOWED: str(os.getpid())},
            start_new_session=True,
        )


def _tell_end(process: "subprocess.Popen[bytes]", line: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(line.encode())
        process.stdin.close()
    except OSError:
        pass  # it has left already
