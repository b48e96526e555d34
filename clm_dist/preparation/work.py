"""The folder beside the target that keeps what is done until all is done: units, locks, the result in the making."""

import errno
import fcntl
import os
import re
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clm_dist.errors import UserError
from clm_dist.storage import write_text

FEW = 16  # units


@dataclass(frozen=True)
class Shard:
    """Which part of the chunks a process takes: all, or every `count`-th."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """'2/8' is the third of eight; UserError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(
                f"--shard {text} names no shard; write INDEX/COUNT with INDEX from 0 to COUNT - 1, e.g. --shard 0/4 "
                "(in a job array: --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT)"
            )
        return cls(int(match[1]), int(match[2]))

    def takes(self, part: int, parts: int, chunk: int) -> bool:
        """Whether a chunk is this shard's. Whole parts where there are enough, so that each is read by one process."""
        return (part if parts >= 4 * self.count else part + chunk) % self.count == self.index

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"


class WorkFolder:
    """Unit files under names that say what they were made from, so that only what is missing has to be made."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.prepare")
        self.units = self.folder / "units"
        self.tokenizer = self.folder / "tokenizer"
        self.result = self.folder / "result"

    def unit(self, part_id: str, number: int) -> Path:
        """Where the unit of a chunk lies."""
        return self.units / f"{part_id}-{number:06d}.npz"

    def done(self) -> dict[str, set[int]]:
        """By part, the chunks whose units are there. One look at the folder, however many parts there are."""
        found: dict[str, set[int]] = defaultdict(set)
        for path in self.units.glob("*.npz"):
            part_id, _, number = path.stem.rpartition("-")
            found[part_id].add(int(number))
        return found

    def noted_chunks(self, part_id: str) -> int | None:
        """How many chunks a part turned out to have when it was read to its end; None if it never was."""
        note = self.units / f"{part_id}.chunks"
        return int(note.read_text()) if note.exists() else None

    def note_chunks(self, part_id: str, number: int) -> None:
        """Remembers how many chunks a part turned out to have."""
        write_text(self.units / f"{part_id}.chunks", str(number))

    def kept(self) -> str:
        """What is kept after a failure, for its message."""
        count = self._count()
        if not count:
            return "nothing of it is kept"
        return f"{count} finished chunks are kept in {self.folder}: the same command goes on from there"

    @contextmanager
    def held(self, shard: Shard, key: str) -> Iterator[None]:
        """Holds the folder for this process: alone for the whole work, or this one shard. UserError where it is taken.

        key: of the settings. What an earlier prepare with the same left is taken over, what one with others did removed.
        """
        with (
            self._locked("all", shared=shard.count > 1) as self._hold,
            self._locked(f"{shard.index}-of-{shard.count}"),
            self._taken_over(key),
        ):
            worth_keeping = 1
            try:
                yield
            except UserError:
                worth_keeping = FEW  # input that has to change: what takes seconds is not worth a folder that stays
                raise
            finally:
                if self._count() < worth_keeping and self._is_ours():
                    self.remove()

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Waits until no other process is in the part of the work called `name`."""
        with self._locked(name, wait=True):
            yield

    @contextmanager
    def _taken_over(self, key: str) -> Iterator[None]:
        """Every process holds a lock of its settings, so that one with others knows whether any is still at work."""
        with ExitStack() as held:
            with self.alone("take-over"):
                if self.key() not in (None, key):
                    with self._locked(f"settings-{self.key()}", why="with other settings"):
                        for folder in (self.units, self.tokenizer):
                            shutil.rmtree(folder, ignore_errors=True)
                self.units.mkdir(exist_ok=True)
                write_text(self.folder / "key", key)
                held.enter_context(self._locked(f"settings-{key}", shared=True))
            yield

    def key(self) -> str | None:
        """Of which settings the units are."""
        note = self.folder / "key"
        return note.read_text() if note.exists() else None

    def _count(self) -> int:
        return sum(1 for _ in self.units.glob("*.npz"))

    def _is_ours(self) -> bool:
        """Whether no other process holds a shard."""
        try:
            fcntl.flock(self._hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def at_work(self) -> list[str]:
        """What each process that holds a part of the work says of itself."""
        found = []
        for path in sorted(self.folder.glob("lock-*-of-*")):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(file.read().strip())
        return found

    def forget(self) -> None:
        """Removes all units."""
        shutil.rmtree(self.units)
        self.units.mkdir()

    def remove(self) -> None:
        """Removes the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, shared: bool = False, wait: bool = False, why: str = "") -> Iterator[TextIO]:
        """flock: the system lets go of it when the process ends, in whatever way. UserError where it is taken."""
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"lock-{name}"
            with path.open("a+") as file:
                try:
                    fcntl.flock(file, mode)
                except BlockingIOError:
                    raise UserError(self._taken(why)) from None
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    # a file system without locks: two processes may do the same work, and come to the same result
                if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    continue  # somebody who was done has just removed the folder
                if not shared:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%H:%M:%S')}\n")
                    file.flush()
                yield file
                return

    def _taken(self, how: str) -> str:
        who = "; ".join(self.at_work()) or "another process"
        return (
            f"data.prepared_dir={self.target} is being prepared{how and ' ' + how} ({who}); wait for it, or share the work "
            "among processes: --shard 0/2 in one, --shard 1/2 in another"
        )
