"""The task of a node: starts the launcher there, and passes signals on to its ranks.

    srun ... python -m clm_dist.cluster.task [--stage PREPARED_DIR] accelerate launch ... -m clm_dist train RECIPE

Slurm signals the task and nothing below it. The launcher would pass a signal on, wait for 30 seconds and kill; so the ranks
are told instead, and the launcher ends as it does after any run. `--machine_rank` is added here: only a task knows it.

Where a rank was killed, its task says so: as soon as the task ends, srun kills the ranks of other nodes, which would have to
be silent about it for seconds to be sure.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from clm_dist import recipe
from clm_dist.cluster.stage import staged
from clm_dist.errors import EXIT_FAILED, EXIT_MISCONFIGURED, RunError, UserError
from clm_dist.watch import failure
from clm_dist.watch.beats import Observation
from clm_dist.watch.outcome import is_told, write_outcome
from clm_dist.watch.watch import FOLDER

PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
LOOK_EVERY = 0.2  # seconds


def command_of(arguments: list[str], node: str) -> list[str]:
    """`accelerate launch ...` with the number of this node."""
    place = arguments.index("launch") + 1
    return [*arguments[:place], "--machine_rank", node, *arguments[place:]]


def children(pid: int) -> list[int]:
    """The processes that a process has started, and that still run."""
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def hears(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: it would die of one that comes too early."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


class Messenger:
    """Hands each signal to each rank once, as soon as the rank listens."""

    def __init__(self) -> None:
        self.waiting: set[signal.Signals] = set()
        self._told: set[tuple[int, int]] = set()
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: self.waiting.add(signal.Signals(number)))

    def deliver(self, launcher: int) -> None:
        """To all ranks that there are now."""
        for number in sorted(self.waiting):
            for rank in children(launcher):
                if (rank, number) not in self._told and hears(rank, number):
                    self._told.add((rank, number))
                    os.kill(rank, number)


def main() -> int:
    """Until the launcher ends; its exit code. What goes wrong before that is one line and the outcome of the start."""
    try:
        return run(sys.argv[1:])
    except (UserError, RunError) as error:
        print(f"node {os.uname().nodename}: {error}", file=sys.stderr, flush=True)
        return write_outcome(EXIT_MISCONFIGURED if isinstance(error, UserError) else EXIT_FAILED)


def run(arguments: list[str]) -> int:
    """The launcher, until it ends."""
    messenger = Messenger()
    prepared = None
    if arguments[0] == "--stage":
        prepared, arguments = arguments[1], arguments[2:]
    node, began = os.environ["SLURM_NODEID"], time.time()
    with staged(prepared, os.environ) as environment:
        launcher = subprocess.Popen(command_of(arguments, node), env=environment)
        while True:
            try:
                code = launcher.wait(LOOK_EVERY)
                break
            except subprocess.TimeoutExpired:
                messenger.deliver(launcher.pid)
    if code:
        print(
            f"node {os.uname().nodename} (number {node}): the launcher ended with {code}", file=sys.stderr, flush=True
        )
        if "train" in arguments and not is_told():
            with contextlib.suppress(UserError):  # of the recipe: a rank has told it
                name_the_killed(run_folder(arguments), began)
    return code if code >= 0 else 128 - code


def run_folder(arguments: list[str]) -> Path:
    """Where the run of `... -m clm_dist train RECIPE ...` is."""
    words = [word for word in arguments[arguments.index("train") + 1 :] if not word.startswith("-")]
    path = next((word for word in words if "=" not in word), "")
    return Path(recipe.load(path, [word for word in words if "=" in word]).run_dir)


def name_the_killed(run: Path, began: float) -> None:
    """Makes the sudden end of a rank of this node the run's failure, if there is one and nobody has named another.

    began: when the launcher did, seconds since 1970.
    """
    observation = Observation(run / FOLDER)
    verdict = observation.judge(patience=math.inf)
    if verdict is None or verdict.stuck or verdict.beat.since < began:  # of an earlier start
        return
    found = verdict.failure(len(observation.look()))
    if failure.claim(run, found, began):
        write_outcome(EXIT_FAILED)
        print(f"clm-dist train: failed: {found.line()} ({run / failure.FAILURE})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
