"""The courier process: follows a training process or is a command of its own, delivers, and ends by itself."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from clm_dist.config import Config
from clm_dist.errors import EXIT_FAILED, RunError, UserError
from clm_dist.publish import outbox
from clm_dist.publish.courier import Destination, OfflineError, make_destination

NICENESS = 10  # training goes first
POLL = 1.0  # seconds between looks at the run folder
LONGEST_PAUSE = 60.0  # seconds between two tries at a destination that does not answer
ORPHANED = 30.0  # seconds to deliver after the training process has gone without a word
TERMINATED = 8.0  # and after a SIGTERM, which a batch system follows by SIGKILL
REPLACED = 5.0  # and after the next start's courier has asked for the place
PATIENCE = 300.0  # seconds that `clm-dist sync` waits for one destination without any progress


class Clock:
    """When a courier that follows has to be gone: a thread, since the main one may hang in a client's call."""

    def __init__(self) -> None:
        self.ended: str | None = None  # how training ended, once it has
        self.leave = threading.Event()
        self.still: Callable[[], bool] = lambda: True
        self._deadline = float("inf")

    def start(self) -> None:
        """On the main thread."""
        signal.signal(signal.SIGTERM, lambda *_: self._bound(TERMINATED))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._run, daemon=True).start()

    def _bound(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        self.leave.set()

    def _listen(self) -> None:
        """To the training process: it says how it ends and how long it waits, or its end of the pipe just closes."""
        words = sys.stdin.readline().split()
        reason, seconds = (words[0], float(words[1])) if len(words) == 2 else ("gone", ORPHANED)
        self.ended = reason
        self._bound(seconds)

    def _run(self) -> None:
        while time.monotonic() < self._deadline:
            time.sleep(outbox.LOOK_EVERY)
            with suppress(OSError):
                if not self.still():
                    self._bound(REPLACED)
        os._exit(EXIT_FAILED)  # what was not confirmed counts as missing; the next delivery looks at what has arrived


def follow(run: Path, name: str, config: Config) -> int:
    """Delivers while training runs, and a bounded time longer. Returns 0 when all that there is has arrived."""
    os.nice(NICENESS)
    clock = Clock()
    clock.start()
    try:
        with outbox.held(run, name, go_on_waiting=lambda: not clock.leave.is_set()) as still:
            clock.still = still
            outbox.log(run, name, f"process {os.getpid()} delivers")
            _tell(run, name, None)
            destination = make_destination(name, run, config)
            problem = _deliver_until_told(run, destination, clock)
            if problem is None:
                problem = _tried(destination.close) or destination.missing()
                _tell(run, name, problem)
    except outbox.TakenError:
        return EXIT_FAILED
    return EXIT_FAILED if problem else 0


def _deliver_until_told(run: Path, destination: Destination, clock: Clock) -> str | None:
    """Returns what went wrong in the last try, if anything."""
    pause, told = POLL, None
    while True:
        leaving = clock.leave.is_set()
        destination.ended = clock.ended
        done = False

        def deliver() -> None:
            nonlocal done
            done = destination.deliver()

        try:
            problem = _tried(deliver)
        except OfflineError as offline:
            problem, leaving = f"offline ({offline})", True
        if problem != told:
            told = problem
            _tell(run, destination.name, problem)
        if leaving and (done or problem):
            return problem
        pause = min(pause * 2, LONGEST_PAUSE) if problem else POLL
        if done or problem:
            clock.leave.wait(pause)


def deliver_now(run: Path, name: str, config: Config, say: Callable[[str], None]) -> str | None:
    """Delivers to one destination all that waits; returns what is missing and why, if anything."""
    try:
        with outbox.held(run, name):
            destination = make_destination(name, run, config)
            if destination.missing() is None:
                return None
            say(f"{name}: {destination.missing()}; delivering ...")
            destination.ended = outbox.how_it_ended(run)
            problem = _within(PATIENCE, lambda: _once(destination))
            left = destination.missing()
            _tell(run, name, problem or left)
            return "; ".join(filter(None, (left, problem))) or None
    except outbox.TakenError as taken:
        left = make_destination(name, run, config).missing()
        return left and f"{left}; {taken} is delivering them: ask again later"


def _once(destination: Destination) -> str | None:
    def all_of_it() -> None:
        while not destination.deliver():
            pass

    try:
        return _tried(all_of_it) or _tried(destination.close)
    except OfflineError as offline:
        return f"offline ({offline})"


def _within(seconds: float, work: Callable[[], str | None]) -> str | None:
    """The work's result; or that there was none in time. Then the thread is left behind: its client may never return."""
    result: list[str | None] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else f"no end after {seconds:.0f} s"


def _tried(work: Callable[[], object]) -> str | None:
    """What went wrong, in one line."""
    try:
        work()
    except OfflineError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())[:300]
        says_enough = text and isinstance(error, OSError | UserError | RunError)
        return text if says_enough else f"{text} ({type(error).__name__})".strip()
    return None


def _tell(run: Path, name: str, problem: str | None) -> None:
    """To the notes, from where training shows it, and to the log. A full disk ends no courier."""
    with suppress(OSError):
        if outbox.notes(run, name).get("problem") != problem:
            outbox.note(run, name, problem=problem)
            outbox.log(run, name, problem or "delivering again")
