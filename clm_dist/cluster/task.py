"""The task of a node: starts the launcher there, and passes signals on to its ranks.

    srun ... python -m clm_dist.cluster.task [--stage PREPARED_DIR] accelerate launch ... -m clm_dist train RECIPE

Slurm signals the task and nothing below it. The launcher would pass a signal on, wait for 30 seconds and kill; so the ranks
are told instead, and the launcher ends as it does after any run. `--machine_rank` is added here: only a task knows it.

Where the rank of a node was killed, its task says so: as soon as the task ends, srun kills the ranks of other nodes, which
would have to see it silent for seconds to be sure.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from clm_dist import recipe
from clm_dist.cluster.stage import staged
from clm_dist.errors import EXIT_FAILED, EXIT_MISCONFIGURED, RunError, UserError
from clm_dist.watch import beats, failure
from clm_dist.watch.outcome import VARIABLE, is_told, write_outcome
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
        return launch(sys.argv[1:])
    except (UserError, RunError) as error:
        print(f"node {os.uname().nodename}: {error}", file=sys.stderr, flush=True)
        return write_outcome(EXIT_MISCONFIGURED if isinstance(error, UserError) else EXIT_FAILED)


def launch(arguments: list[str]) -> int:
    """The launcher, until it ends."""
    messenger = Messenger()
    prepared = None
    if arguments[0] == "--stage":
        prepared, arguments = arguments[1], arguments[2:]
    node, began, run = os.environ["SLURM_NODEID"], time.time(), None
    if "train" in arguments and VARIABLE in os.environ:  # now: the recipe may be edited meanwhile
        with contextlib.suppress(UserError, OSError):  # a rank tells it
            run = run_folder(arguments)
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
        # naming changes nothing of how this ends: a disk may be full, a launcher be called without a number of processes
        with contextlib.suppress(OSError, ValueError):
            if run is not None and not is_told():
                name_the_killed(run, began, int(arguments[arguments.index("--num_processes") + 1]))
    return code if code >= 0 else 128 - code


def run_folder(arguments: list[str]) -> Path:
    """Where the run of `... -m clm_dist train RECIPE ...` is."""
    words = arguments[arguments.index("train") + 1 :]
    if "--deepspeed" in words:
        place = words.index("--deepspeed")
        words = words[:place] + words[place + 2 :]
    path, *overrides = [word for word in words if not word.startswith("-")] or [""]
    return Path(recipe.load(path, overrides).run_dir)


def name_the_killed(run: Path, began: float, world_size: int) -> None:
    """Makes the sudden end of this node's rank the run's failure, unless another has been named.

    Of several ranks of a node none is named here: the launcher ends the others, and by now all are gone.
    began: when the launcher did, seconds since 1970.
    """
    gone = [beat for beat in beats.read(run / FOLDER).values() if beats.is_gone(beat)]
    if len(gone) != 1 or gone[0].since < began:  # of an earlier start
        return
    found = beats.Verdict(gone[0], beats.GONE).failure(world_size)
    if failure.claim(run, found, began):
        write_outcome(EXIT_FAILED)
        print(f"clm-dist train: failed: {found.line()} ({run / failure.FAILURE})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
