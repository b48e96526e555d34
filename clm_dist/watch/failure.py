"""failure.json: the one root cause of a run that failed, and who is only its victim."""

import contextlib
import fcntl
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from clm_dist.errors import RunError

FAILURE = "failure.json"
FORMER = "failures"  # those of earlier starts

# What a rank meets whose peer has gone. Names, since this wing knows no torch.
LOST_PEER_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
LOST_PEER_WORDS = ("closed by peer", "reset by peer", "gloo", "NCCL", "ProcessGroup", "Broken pipe", "TCPStore")


@dataclass(frozen=True)
class Failure:
    """What went wrong where. Times are seconds since 1970."""

    rank: int
    host: str
    pid: int
    phase: str  # preparing, training, evaluation, saving, exporting
    step: int
    error: str
    traceback: str
    since: float  # when it entered what it was doing
    time: float
    world_size: int

    def line(self) -> str:
        """What the screen says, once."""
        return f"rank {self.rank} of {self.world_size} on {self.host}, {self.phase} at step {self.step}: {self.error}"


def describe(error: BaseException) -> tuple[str, str]:
    """An exception in one line, and its traceback."""
    lines = [str(error)] if isinstance(error, RunError) else traceback.format_exception_only(error)
    return " ".join("".join(lines).split()), "".join(traceback.format_exception(error))


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception says no more than that another process is gone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    is_runtime = isinstance(error, RuntimeError | OSError)
    return bool(names & LOST_PEER_ERRORS) or (is_runtime and any(word in str(error) for word in LOST_PEER_WORDS))


def claim(folder: Path, failure: Failure, began: float) -> bool:
    """Makes `failure` the run's failure.json; False where another rank was first.

    A hard link either makes the name or fails: two ranks cannot both be first, and nobody reads half a file.
    began: when this process began; what was written before that is of an earlier start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _is_former(folder, began):
        with _alone(folder):  # another rank may have done it, and already written what went wrong now
            if _is_former(folder, began):
                set_aside(folder)
    written = folder / f".failure-{failure.rank}-{os.getpid()}.json"
    written.write_text(json.dumps(asdict(failure), indent=2) + "\n", encoding="utf-8")
    try:
        os.link(written, folder / FAILURE)
    except FileExistsError:
        return False
    finally:
        written.unlink()
    return True


def _is_former(folder: Path, began: float) -> bool:
    try:
        return (folder / FAILURE).stat().st_mtime < began
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def set_aside(folder: Path) -> None:
    """What an earlier start left makes room for what may go wrong now. On one process, before the others watch."""
    path = folder / FAILURE
    if path.exists():
        (folder / FORMER).mkdir(exist_ok=True)
        path.rename(folder / FORMER / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json")


def read(folder: Path) -> Failure | None:
    """The run's failure, if there is one and it can be read."""
    try:
        return Failure(**json.loads((folder / FAILURE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def hostname() -> str:
    """The name of this machine."""
    return socket.gethostname()
