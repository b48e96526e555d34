"""DeepSpeed's processes: joined by a back end that is there, with the settings that were resolved and no others."""

import contextlib
import fcntl
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from clm_dist.errors import RunError

EXTENSIONS = "TORCH_EXTENSIONS_DIR"  # where torch builds C++ at run time


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
    """Where C++ extensions are built once and then found: a folder of our own, by the versions that decide what is built."""
    named = os.environ.get(EXTENSIONS)
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "clm-dist" / "extensions" / f"torch-{torch.__version__}"


def build_extension() -> None:
    """What DeepSpeed needs to talk between processes on CPUs; half a minute the first time. Every rank must call this.

    torch guards a build by a file named `lock`, which stays when the process that builds is killed: every later start would
    wait for it for ever, and say nothing. Ours is a lock of the kernel, which ends with its process, around it: whoever
    holds ours and finds theirs has found a stale one.
    """
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    own = not os.environ.get(EXTENSIONS)
    os.environ[EXTENSIONS] = str(folder)
    # ninja is found by PATH; that of another environment would build everything anew
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with (folder / ".clm-dist.lock").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for lock in stale_locks(folder):
            if not own:
                raise RunError(
                    f"{lock} was left by a build that ended; DeepSpeed would wait for it for ever. If nothing builds there "
                    f"now, remove it; or unset {EXTENSIONS}, and a folder of our own is used"
                )
            lock.unlink(missing_ok=True)
            print(f"removed {lock}, which a build that was killed left behind", flush=True)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


def stale_locks(folder: Path) -> list[Path]:
    """torch's lock files below a folder of extensions."""
    return sorted(folder.glob("*/lock")) + sorted(folder.glob("*/*/lock"))
