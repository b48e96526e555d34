"""The folder of a run: what stands in it, and that no other run is ever overwritten unasked."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from clm_dist import recipe
from clm_dist.config import Config
from clm_dist.errors import UserError
from clm_dist.versions import versions

# What train and the commands after it write; --overwrite removes these and nothing else.
CONTENTS = (
    *("config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "report.html"),
    *("model", "model_best", "tensorboard", "wandb"),
)


def check_free(run_dir: str, overwrite: bool, sources: Iterable[str] = ()) -> None:
    """Refuses a folder that holds something, unless it is a run and the user asked to replace it.

    sources: what the run reads (weights, tokenizer); a run that would delete them is refused.
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


def create(config: Config, accelerator: Any, base_model_commit: str | None, overwrite: bool) -> None:
    """Fills the run folder, emptied where the user asked for that. On the main process, after `check_free` on all ranks.

    base_model_commit: what `model.name` resolved to on the Hub; None for a folder or a model from scratch.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        staged = [path.name for path in folder.iterdir() if _is_staged(path.name)]
        for name in (*CONTENTS, *staged):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    try:
        with (folder / "config.yaml").open("x", encoding="utf-8") as file:  # who makes it owns the folder
            file.write(recipe.dump(config))
    except FileExistsError:
        raise UserError(
            f"run_dir={config.run_dir} was taken by another run that started meanwhile; set another run_dir"
        ) from None
    facts = {**environment(accelerator), "base_model_commit": base_model_commit}
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _is_staged(name: str) -> bool:
    """What an export or a report left that was killed while writing."""
    return name.startswith(".") and name.endswith((".partial", ".former"))


def environment(accelerator: Any) -> dict[str, Any]:
    """What a figure of this run depends on beside its configuration."""
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
        "versions": versions(),
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
