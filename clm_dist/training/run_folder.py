"""The folder of a run: what stands in it, and that no other run is ever overwritten unasked."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from clm_dist import recipe
from clm_dist.config import Config
from clm_dist.errors import EXIT_FAILED, RunEnded, UserError
from clm_dist.storage import sync, write_text
from clm_dist.versions import versions
from clm_dist.watch.failure import FAILURE, hostname, set_aside
from clm_dist.watch.watch import FOLDER, STOP_FILE, Watch

# What train and the commands after it write; --overwrite removes these and nothing else.
CONTENTS = (
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json", "report.html"),
    *("model", "model_best", "tensorboard", "wandb", "checkpoints", "ledger.jsonl", "offending", "configs", "outbox"),
    *("mlflow.db", "profile"),
    "environment.json",  # last: while it stands, what is left is known to be of a run
)
# What processes tell each other, or left when they failed, and what a job reads that waits for nodes: no run yet.
SERVICE = (".lock", ".watch", "failure.json", "failures", "STOP", "slurm")
GROWING = ("metrics.jsonl", "samples.jsonl")
PATIENCE = 60  # seconds that processes of the last start have to leave


def is_run(run_dir: str) -> bool:
    """Whether a run has begun in this folder."""
    return (Path(run_dir) / "config.yaml").is_file()


def check_free(run_dir: str, overwrite: bool, sources: Iterable[str] = (), resume: bool = False) -> None:
    """Refuses a folder that holds something, unless it is a run and the user asked to replace it, or to go on with it.

    sources: what the run reads (weights, tokenizer); a run that would delete them is refused. resume: whether to go on.
    """
    folder = Path(run_dir)
    for source in sources:
        if overwrite and Path(source).exists() and Path(source).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--overwrite would delete {source}, which this run starts from; choose another run_dir")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir={run_dir} cannot be a folder: {existing} is a file; choose another run_dir")
    if not os.access(existing, os.W_OK):
        raise UserError(f"run_dir={run_dir} cannot be written ({existing} is read-only to you); choose another run_dir")
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    present = [name for name in present if name not in SERVICE]
    if resume and not overwrite and is_run(run_dir):
        return  # whether it is the same run is asked elsewhere
    if set(present) <= {"environment.json"} | {name for name in present if _is_staged(name)}:
        return  # of a start that ended before the run began
    if present and not overwrite:
        raise UserError(
            f"run_dir={run_dir} holds another run ({', '.join(present[:4])}, ...); set another run_dir to keep both, or add "
            "--overwrite to replace it"
        )
    foreign = [name for name in present if name not in CONTENTS and not _is_staged(name)]
    if foreign:
        raise UserError(
            f"run_dir={run_dir} holds {foreign[0]}, which is not of a run: not overwritten; choose another run_dir"
        )
    if present and "environment.json" not in present:  # a folder called `model` alone may be anybody's
        raise UserError(
            f"run_dir={run_dir} holds {present[0]} but no environment.json, so it is no run: not overwritten; "
            "choose another run_dir"
        )


@contextmanager
def joined(config: Config, accelerator: Any, watch: Watch) -> Iterator[None]:
    """The run folder is this run's own inside, and its processes watch each other there. Every rank must call this.

    What goes wrong inside becomes the run's failure.json, and one line on the screen.
    """
    folder = Path(config.run_dir)
    watch.run = folder
    lock = None
    try:
        if accelerator.is_main_process:
            lock = claim(config.run_dir)
            set_aside(folder)
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            (folder / FOLDER).mkdir()
            (folder / STOP_FILE).unlink(missing_ok=True)  # it was meant for an earlier start
        accelerator.wait_for_everyone()
        watch.join(folder, config.train.hang_seconds)
        yield
        watch.part()
    except UserError:
        if lock is not None and {path.name for path in folder.iterdir()} <= {".lock", FOLDER}:  # nothing has begun
            shutil.rmtree(folder)
        raise
    except RunEnded:
        raise
    except Exception as error:
        line = watch.failed(error)
        raise RunEnded(line and f"failed: {line} ({folder / FAILURE})", EXIT_FAILED) from error
    finally:
        if lock is not None:
            lock.close()


def claim(run_dir: str) -> TextIO:
    """Makes the run this process's own, while the file that is returned stays open. On the main process.

    Waits a while for one that is just leaving: a launcher may be gone before its processes are.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("a+", encoding="utf-8")
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            if time.monotonic() > deadline:
                raise UserError(
                    f"run_dir={run_dir} is being written by {owner}; wait for it, stop it, or set another run_dir"
                ) from None
            if not told:
                print(f"waiting for {owner} to leave {run_dir} ...", flush=True)
                told = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            break
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {hostname()}\n")
    lock.flush()
    return lock


def create(config: Config, accelerator: Any, base_model_commit: str | None, overwrite: bool) -> None:
    """Fills the run folder, emptied where the user asked for that. On the main process, which has claimed it.

    base_model_commit: what `model.name` resolved to on the Hub; None for a folder or a model from scratch.
    """
    folder = Path(config.run_dir)
    if overwrite:
        staged = [path.name for path in folder.iterdir() if _is_staged(path.name)]
        for name in (*staged, *CONTENTS):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    facts = {**environment(accelerator), "base_model_commit": base_model_commit}
    write_text(folder / "environment.json", json.dumps(facts, indent=2) + "\n")
    write_text(folder / "config.yaml", recipe.dump(config))  # last: with it, it is a run


def go_on(config: Config, step: int) -> None:
    """Keeps config.yaml that of what comes now, and the one that was in force until `step`. On the main process."""
    folder, text = Path(config.run_dir), recipe.dump(config)
    former = (folder / "config.yaml").read_text(encoding="utf-8")
    if former != text:
        (folder / "configs").mkdir(exist_ok=True)
        write_text(folder / "configs" / f"until-step-{step:08d}-{time.strftime('%Y%m%d-%H%M%S')}.yaml", former)
        write_text(folder / "config.yaml", text)


def lengths(run_dir: str) -> dict[str, int]:
    """How long the files are that only grow, forced to disk: a checkpoint remembers. On the main process."""
    found = {}
    for name in GROWING:
        path = Path(run_dir) / name
        if path.exists():
            sync(path)
            found[name] = path.stat().st_size
    return found


def cut(run_dir: str, wanted: dict[str, int]) -> list[str]:
    """Takes away what was written after a checkpoint; returns what is missing from before it. On the main process."""
    missing = []
    for name in GROWING:
        path, length = Path(run_dir) / name, wanted.get(name, 0)
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            missing.append(f"{path} has {size:,} bytes, {length:,} were written before the checkpoint: rows are lost")
        elif size > length:
            os.truncate(path, length)
    return missing


def _is_staged(name: str) -> bool:
    """What an export or a report left that was killed while writing."""
    return name.startswith(".") and name.endswith((".partial", ".former"))


def environment(accelerator: Any) -> dict[str, Any]:
    """What a figure of this run depends on beside its configuration."""
    import torch  # here: whether a folder is free is asked before torch is loaded

    cuda = torch.cuda.is_available()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type).split(".")[-1],
        "mixed_precision": accelerator.mixed_precision,
        "device": torch.cuda.get_device_name() if cuda else accelerator.device.type,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads_per_process": torch.get_num_threads(),
        "versions": {**versions(), "torch": torch.__version__},  # with its build, as in 2.13.0+cpu
    }


def commit() -> str | None:
    """The commit of this package's source, with a mark where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # else the repository around an environment would answer
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None
