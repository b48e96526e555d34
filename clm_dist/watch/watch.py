"""One thread a process that hears signals, shows life, spreads the wish to stop, and ends the process when a peer failed."""

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from clm_dist.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED
from clm_dist.watch import beats, failure
from clm_dist.watch.outcome import write_outcome

LOOK_EVERY = 0.25  # seconds between looks at files
BEAT_EVERY = 1.0  # seconds between signs of life
DOWNLOAD = 1700  # seconds that a rank may be busy before training, with weights to fetch; a collective waits for 1800
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
STOP_FILE = "STOP"  # `touch RUN/STOP` asks a run to save and leave
CTRL_C = signal.SIGINT.name
WISHES = {True: "interrupt", False: "stop"}  # files by which a rank tells the others that it leaves
FOLDER = ".watch"  # inside the run folder


class Watch:
    """Of one process. The main thread tells it where it is; the thread tells the main thread to stop."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.began = time.time()
        self.reason: str | None = None  # why this process was asked to stop
        self.interrupted = False  # by Ctrl-C or a stop file: somebody is there, nothing is to be queued again
        self.asked_at = 0.0  # monotonic
        self.may_leave = True  # nothing would be lost if the process left at once
        self.phase, self.step, self.micro_step, self.place = "preparing", 0, 0, "starting"
        self.since = time.time()
        self.deadline: Callable[[], float] | None = None  # monotonic time by which a stop has to be asked for
        self.run: Path | None = None  # the run folder, once it is known to be ours
        self._moved = time.monotonic()
        self._joined = False
        self._limit = float("inf")
        self._number = 0
        self._parent = os.getppid()
        self._main = threading.main_thread()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def start(self) -> None:
        """Hears signals from now on. On the main thread."""
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # that Python takes it at all; the byte in the pipe is what counts
        # The byte is written by the C handler: it arrives even while the main thread waits inside a collective.
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._loop, name="watch", daemon=True).start()

    def join(self, run: Path, limit: float) -> None:
        """Shows life among the ranks from now on. After the main process has emptied the folder, on every rank.

        limit: seconds without progress after which a rank is named.
        """
        self.run, self._limit = run, limit
        self._observation = beats.Observation(run / FOLDER)
        self._moved = time.monotonic()
        self._joined = True

    def part(self) -> None:
        """The run is over: no more signs of life; the main process takes those of all away. After the last barrier."""
        self._joined = False
        folder = self._observation.folder
        for _ in range(20 if self.rank == 0 else 0):  # the thread of a rank may just be writing into it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                return
            time.sleep(0.05)

    def at(self, place: str, micro_step: int | None = None) -> None:
        """The main thread has come here. Cheap: called several times a micro-step."""
        self.place = place
        if micro_step is not None:
            self.micro_step = micro_step
        self.since, self._moved = time.time(), time.monotonic()

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread is in this phase from now on, and shows it at once."""
        self.phase, self.step = phase, self.step if step is None else step
        self.at(phase)
        with contextlib.suppress(BlockingIOError):  # nobody reads: it was never started
            os.write(self._writer, b"\0")

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What happens inside is of this phase, in failures too: after an exception the phase stays."""
        former = self.phase
        self.enter(phase)
        yield
        self.enter(former)

    def let_leave(self) -> None:
        """Nothing can be lost any more: a wish to stop is granted at once, an earlier one too."""
        self.may_leave = True
        if self.reason is not None:
            self._grant()

    def ask_to_stop(self, reason: str, interrupted: bool = False) -> None:
        """Notes the wish; the ranks agree later. Asked twice is asked once, but for a second Ctrl-C."""
        if self.reason is not None:
            if reason == self.reason == CTRL_C and time.monotonic() - self.asked_at > 1:
                self._leave("interrupted again; left without saving", EXIT_INTERRUPTED)
            return
        self.reason, self.interrupted, self.asked_at = reason, interrupted, time.monotonic()
        if self.may_leave:
            self._grant()

    def _grant(self) -> None:
        """Leaves, and has the others leave."""
        if self.run is not None and self._joined:
            time.sleep(LOOK_EVERY)  # a launcher signals those whose peer has failed
            if (self.run / failure.FAILURE).exists():
                self._leave(None, EXIT_FAILED)
        self._pass_on()
        code = EXIT_INTERRUPTED if self.interrupted else EXIT_PREEMPTED
        self._leave(f"stopped by {self.reason} while {self.phase}; the same command goes on from there", code)

    def failed(self, error: BaseException) -> str | None:
        """Makes the error of this rank the run's failure, unless it is a consequence of another's. Returns what to say."""
        assert self.run is not None
        line, text = failure.describe(error)
        found = self._failure(self.rank, line, text)
        if failure.lost_a_peer(error) and self.world_size > 1:
            for _ in range(16):  # the cause may need a moment to be written
                if failure.read(self.run) is not None:
                    return None
                if self._joined:
                    self._observation.look()  # a rank on another machine is known to be gone by its silence alone
                time.sleep(LOOK_EVERY)
            verdict = self._observation.judge(patience=3 * BEAT_EVERY) if self._joined else None
            if verdict is not None and verdict.beat.rank != self.rank and not verdict.stuck:
                found = verdict.failure(self.world_size)
        return found.line() if failure.claim(self.run, found, self.began) else None

    def _loop(self) -> None:
        """Until the process ends."""
        next_beat, last_look = 0.0, time.monotonic()
        while True:
            ready, _, _ = select.select([self._reader], [], [], LOOK_EVERY)
            if ready:
                for number in os.read(self._reader, 64):
                    if number == 0:  # the main thread is somewhere else
                        next_beat = 0.0
                    elif number in SIGNALS:  # libraries may have handlers of their own for others
                        self.ask_to_stop(signal.Signals(number).name, interrupted=number == signal.SIGINT)
            now = time.monotonic()
            if now - last_look > 10 * LOOK_EVERY:  # this process itself stood still (suspended): judge nobody by that
                self._moved = now
                if self._joined:
                    self._observation = beats.Observation(self._observation.folder)
            last_look = now
            self._look_around(now)
            if self._joined and now >= next_beat:
                next_beat = now + BEAT_EVERY
                with contextlib.suppress(OSError):  # a full disk must not end the run
                    self._beat()
                self._look_for_the_stuck(now)

    def _look_around(self, now: float) -> None:
        """Other reasons to stop, and failures of others."""
        if os.getppid() != self._parent and "LOCAL_RANK" in os.environ:
            self.ask_to_stop("the end of the launcher")
        if self.deadline is not None and now >= self.deadline():
            self.ask_to_stop("the time limit")
        if not self._joined or self.run is None:
            return
        if (self.run / STOP_FILE).exists():
            self.ask_to_stop("the stop file", interrupted=True)
        for interrupted, name in WISHES.items():
            if (self.run / FOLDER / name).exists():
                self.ask_to_stop("another process's wish", interrupted)
        if (self.run / failure.FAILURE).exists():
            time.sleep(0.5)  # an exception of our own may just be on its way
            self._leave(None, EXIT_FAILED)

    def _pass_on(self) -> None:
        """Tells the other ranks, who may wait for us."""
        if self._joined and self.run is not None:
            with contextlib.suppress(OSError):
                (self.run / FOLDER / WISHES[self.interrupted]).touch()
                (self.run / STOP_FILE).unlink(missing_ok=True)  # it is honoured

    def _beat(self) -> None:
        assert self.run is not None
        self._number += 1
        frame = sys._current_frames().get(self._main.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        state = (self.phase, self.step, self.micro_step, self.place, self.since, stack)
        beats.write(self.run / FOLDER, beats.Beat(self.rank, failure.hostname(), os.getpid(), self._number, *state))

    def _look_for_the_stuck(self, now: float) -> None:
        """Names who holds us up, before the limit is over. Looks at others only when there is a reason to."""
        idle = now - self._moved
        if idle < 0.4 * self._limit:
            return
        self._observation.look()
        if idle < 0.85 * self._limit:
            return
        verdict = self._observation.judge(patience=min(0.25 * self._limit, 30))
        if verdict is None or (verdict.stuck and self.phase == "preparing" and idle < 0.85 * DOWNLOAD):
            return
        found = verdict.failure(self.world_size)
        assert self.run is not None
        if failure.claim(self.run, found, self.began):
            self._leave(f"failed: {found.line()}", EXIT_FAILED)

    def _failure(self, rank: int, line: str, text: str) -> failure.Failure:
        position = (self.phase, self.step, line, text, self.since, time.time(), self.world_size)
        return failure.Failure(rank, failure.hostname(), os.getpid(), *position)

    def _leave(self, message: str | None, code: int) -> None:
        """Ends the process here and now, whatever its main thread waits for."""
        write_outcome(code)
        if message is not None and (code == EXIT_FAILED or os.environ.get("LOCAL_RANK", "0") == "0"):
            where = f" ({self.run / failure.FAILURE})" if code == EXIT_FAILED and self.run is not None else ""
            print(f"clm-dist train: {message}{where}", file=sys.stderr, flush=True)
        os._exit(code)  # not 0: a launcher then ends those that are not told by us
