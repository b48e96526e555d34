"""RUN/outbox: what of a run has arrived where, a file for each destination; and the one process that may deliver there."""

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from clm_dist.storage import write_text

FOLDER = "outbox"
IDS = "ids"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
LOOK_EVERY = 0.2  # seconds


class TakenError(Exception):
    """Another process delivers to this destination; the message says which."""


def notes(run: Path, name: str) -> dict[str, Any]:
    """What is known of a destination: RUN/outbox/NAME.json; nothing before anything was done for it."""
    try:
        found = json.loads((run / FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a machine that lost its power may have left an empty file
        return {}
    return found if isinstance(found, dict) else {}


def note(run: Path, name: str, **values: Any) -> None:
    """Lays values over the notes; the file is written whole. Only who holds the destination may, or starts its courier."""
    (run / FOLDER).mkdir(exist_ok=True)
    write_text(run / FOLDER / f"{name}.json", json.dumps({**notes(run, name), **values}, indent=1) + "\n")


def log(run: Path, name: str, line: str) -> None:
    """One line to RUN/outbox/NAME.log, if there is room."""
    with suppress(OSError), (run / FOLDER / f"{name}.log").open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def identify(run: Path, saved: dict[str, str]) -> dict[str, str]:
    """By which ids dashboards know this run: RUN/outbox/ids.json, made at the first start. On the main process.

    saved: those of the checkpoint that it goes on from, for a run whose outbox was lost. A run that goes on in another
    folder while the first one still stands is another run: both may be trained further.
    """
    here = str(run.resolve())
    found = notes(run, IDS)
    if found and not _same_folder(found["run_dir"], here):
        shutil.rmtree(run / FOLDER)  # what has arrived, has arrived of the other run
        found = {}
    if not found and saved and Path(saved["run_dir"]).is_dir() and _same_folder(saved["run_dir"], here):
        found = saved
    job = os.environ.get("SLURM_ARRAY_JOB_ID")  # its tasks are one sweep; a later `sync` is outside of the job
    group = {"group": f"array-{job}"} if job else {}
    ids = {"wandb": "".join(secrets.choice(LETTERS) for _ in range(8)), **group, **found, "run_dir": here}
    if ids != found:
        with suppress(OSError):  # a full disk ends no training; checkpoints hold the ids too
            note(run, IDS, **ids)
    return ids


def _same_folder(noted: str, here: str) -> bool:
    """Whether the folder was only moved, or has another name on this machine."""
    return not (Path(noted) / "config.yaml").is_file() or Path(noted).samefile(here)


@contextmanager
def held(run: Path, name: str, go_on_waiting: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
    """This process alone delivers to the destination inside. Yields a question: is it still the one?

    A courier of a new start asks a former one to leave and waits for that, as long as go_on_waiting() says so.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    path, successor = folder / f".{name}.lock", folder / f".{name}.successor"
    with path.open("a+", encoding="utf-8") as lock:
        while not _lock(lock):
            if not go_on_waiting():
                lock.seek(0)
                raise TakenError(lock.read().strip() or "another process")
            successor.touch()
            time.sleep(LOOK_EVERY)
        successor.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk: whoever asks for the name finds none
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        inode = os.fstat(lock.fileno()).st_ino

        def still() -> bool:
            """Nobody has asked for the place, and the run is still there (--overwrite takes its outbox away)."""
            try:
                return path.stat().st_ino == inode and not successor.exists()
            except FileNotFoundError:
                return False

        yield still


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the couriers of one run come one after the other anyway
        return True
    return True


def how_it_ended(run: Path) -> str:
    """`finished`, or what the ledger says of a run that did not come to its end; `gone` where it says nothing."""
    try:
        last = json.loads((run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return str(last["state"]) if last["event"] == "end" else "gone"
    except (OSError, ValueError, IndexError, KeyError):
        return "gone"
