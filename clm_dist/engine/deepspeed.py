"""DeepSpeed's processes: joined by a back end that is there, with the settings that were resolved and no others."""

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from clm_dist.errors import RunError

EXTENSIONS = "TORCH_EXTENSIONS_DIR"  # where torch builds C++ at run time
EXTENSION = "deepspeed_shm_comm"


def start_deepspeed(mixed_precision: str, resolved: dict[str, Any], timeout: InitProcessGroupKwargs) -> Accelerator:
    """The Accelerator of this process. resolved: DeepSpeed's settings without any "auto". Every rank must call this."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # what an Accelerate configuration said of DeepSpeed is resolved; beside resolved settings it would be refused
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates: two lines a gather
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if not torch.accelerator.is_available():
        # without it Accelerate reports one process on every rank, and each would train on all the data
        timeout.backend = "gloo"
        build_extension()
    with contextlib.redirect_stdout(io.StringIO()):  # "built successfully", from every rank
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=resolved["gradient_accumulation_steps"],
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=resolved, zero3_init_flag=False),
            kwargs_handlers=[timeout],
        )
    from transformers.integrations import unset_hf_deepspeed_config

    # else transformers would build the model in shards, whose random weights are others than those of one process
    unset_hf_deepspeed_config()
    return accelerator


def extensions_folder() -> Path:
    """Where C++ extensions are built once and then found: a folder of our own, one for each environment.

    The commands of a build name the environment's headers: two environments in one folder would each build it anew.
    """
    named = os.environ.get(EXTENSIONS)
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_by = f"{sys.prefix} {sys.version} {version('deepspeed')}"
    name = f"torch-{torch.__version__}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
    return cache / "clm-dist" / "extensions" / name


def build_extension() -> None:
    """What DeepSpeed needs to talk between processes on CPUs; a minute of compiling, once. Every rank must call this.

    torch guards a build by a file named `lock`, which stays when the process that builds is killed: every later start would
    wait for it for ever, and say nothing. Ours is a lock of the kernel, which ends with its process, around it: whoever
    holds ours and finds theirs has found a stale one. It is ours to remove in a folder of our own, and where our guard says
    that a build of ours began and did not end.
    """
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    own = not os.environ.get(EXTENSIONS)
    os.environ[EXTENSIONS] = str(folder)
    # ninja is found by PATH; that of another environment would build everything anew
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with _guarded(folder) as guard:
        guard.seek(0)
        begun = guard.read().strip()
        for lock in stale_locks(folder):
            if not own and not begun:
                raise RunError(
                    f"{lock} was left by a build that ended; DeepSpeed would wait for it for ever. If nothing builds there "
                    f"now, remove it; or unset {EXTENSIONS}, and a folder of our own is used"
                )
            lock.unlink(missing_ok=True)
            print(f"removed {lock}, which a build that was killed left behind", flush=True)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.accelerator import get_accelerator

        if not _built(folder):
            print(f"compiling what DeepSpeed needs on CPUs, once, into {folder}: a minute or more ...", flush=True)
        guard.write(f"process {os.getpid()} builds\n")
        guard.flush()
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
        guard.truncate(0)


@contextlib.contextmanager
def _guarded(folder: Path) -> Iterator[TextIO]:
    """The guard of a folder of extensions, held inside; one line where a build of another process is waited for."""
    with (folder / ".clm-dist.lock").open("a+") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not _built(folder) and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"waiting for the process that compiles into {folder} ...", flush=True)
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield guard


def _built(folder: Path) -> bool:
    return any(folder.glob(f"**/{EXTENSION}/{EXTENSION}.so"))


def stale_locks(folder: Path) -> list[Path]:
    """torch's lock files below a folder of extensions."""
    return sorted(folder.glob("*/lock")) + sorted(folder.glob("*/*/lock"))
