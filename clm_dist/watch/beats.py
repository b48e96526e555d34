"""Signs of life: each rank writes where its main thread is, and who looks at them finds out which one is stuck."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from clm_dist.storage import write_text
from clm_dist.watch.failure import Failure, hostname

# Within a step, in this order: who is behind keeps the others waiting.
PLACES = ("data", "forward and backward", "update", "waiting for the others")
WAITING = PLACES[-1]
GONE = "its process is gone (killed, perhaps out of memory); this was its last sign of life"


@dataclass(frozen=True)
class Beat:
    """Where a rank was a moment ago."""

    rank: int
    host: str
    pid: int
    number: int  # counts up while the process lives
    phase: str
    step: int
    micro_step: int
    place: str
    since: float  # seconds since 1970: when its main thread came there
    stack: str  # of the main thread

    def progress(self) -> tuple[bool, int, int, int]:
        """Sorts ranks by how far they are; those that wait for others come last."""
        place = PLACES.index(self.place) if self.place in PLACES else 0
        return (self.place == WAITING, self.step, self.micro_step, place)


def write(folder: Path, beat: Beat) -> None:
    """Puts a sign of life where the others look."""
    write_text(folder / f"rank-{beat.rank:05d}.json", json.dumps(asdict(beat)))


def read(folder: Path) -> dict[int, Beat]:
    """The newest sign of every rank."""
    found = {}
    for path in folder.glob("rank-*.json"):
        try:
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        found[beat.rank] = beat
    return found


def is_gone(beat: Beat) -> bool:
    """Whether a rank on this machine has ended."""
    if beat.host != hostname():
        return False
    try:
        os.kill(beat.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:  # ended, but its parent has not looked yet
        return Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


@dataclass(frozen=True)
class Verdict:
    """Which rank holds up the others, and how that is known."""

    beat: Beat
    reason: str
    stuck: bool = False  # it lives, and gets no further

    def failure(self, world_size: int) -> Failure:
        """It as the failure of a run of so many ranks."""
        beat = self.beat
        position = (beat.phase, beat.step, self.reason, beat.stack, beat.since, time.time(), world_size)
        return Failure(beat.rank, beat.host, beat.pid, *position)


class Observation:
    """What one process sees of all ranks over a while. Clocks of different machines are never compared: a rank lives
    if its counter moves while we look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its counter, and when we first saw it so

    def look(self) -> dict[int, Beat]:
        """Reads all signs of life."""
        beats, now = read(self.folder), time.monotonic()
        for rank, beat in beats.items():
            if self._seen.get(rank, (None, 0.0))[0] != beat.number:
                self._seen[rank] = (beat.number, now)
        return beats

    def silent_seconds(self, rank: int) -> float:
        """For how long the counter of a rank has not moved."""
        return time.monotonic() - self._seen[rank][1] if rank in self._seen else 0.0

    def judge(self, patience: float) -> Verdict | None:
        """Names a rank that has ended, else one silent for `patience` seconds, else the one furthest behind."""
        beats = self.look()
        if not beats:
            return None
        for beat in beats.values():
            if is_gone(beat):
                return Verdict(beat, GONE)
        for rank, beat in beats.items():
            if (seconds := self.silent_seconds(rank)) >= patience:
                return Verdict(beat, f"no sign of life for {seconds:.0f} s (killed, stopped, or its machine hangs)")
        behind = min(beats.values(), key=Beat.progress)
        return Verdict(behind, f"no progress for {time.time() - behind.since:.0f} s ({behind.place})", stuck=True)
