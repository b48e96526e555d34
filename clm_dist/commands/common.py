"""What several commands begin with."""

import argparse
import os
from pathlib import Path
from typing import Any

from clm_dist import recipe
from clm_dist.config import Config
from clm_dist.errors import UserError


def refuse_launcher(command: str) -> None:
    """Under a launcher each rank would do all of it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{command} is one process's work; run `clm-dist {command}` without the launcher")


def run_of(given: str) -> tuple[Path, Config]:
    """The folder of a run, and what it was trained by."""
    run = Path(given)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder (there is no config.yaml in it); give the folder that `train` wrote")
    return run, recipe.load(run / "config.yaml", [])


def check_output(output: str | None, suffix: str) -> None:
    """Refuses a file that exists, or that cannot be written, before any work is done for it."""
    if output is None:
        return
    path = Path(output)
    if path.exists():
        raise UserError(f"--output {output} exists; choose another name or remove it")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}; make it or choose another place")
    if not output.endswith(suffix):
        raise UserError(f"--output {output} does not end in {suffix}; give it that ending")


def quiet_libraries() -> None:
    """The libraries' own bars and notices stand between our lines and fill batch logs; errors still come."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    quiet_hub()


def quiet_hub() -> None:
    """The same of the Hub's library alone, which is imported in a fifth of the time of transformers."""
    from huggingface_hub.utils import logging as hub_logging

    # a data set without a card is a data set; and that it tries five times is told by the message at the end
    hub_logging.set_verbosity_error()


def settled(config: Config) -> Config:
    """With a precision in the place of auto; says which, once."""
    from clm_dist.training.precision import settle_precision

    config, line = settle_precision(config)
    if line is not None and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
    return config


def name_deepspeed(args: argparse.Namespace) -> None:
    """--deepspeed, to where all that asks for a launch's settings looks."""
    if args.deepspeed is not None:
        from clm_dist.planning.deepspeed_launch import OWN_VARIABLE

        os.environ[OWN_VARIABLE] = args.deepspeed


def device() -> Any:
    """The accelerator of this machine, or its CPU."""
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
