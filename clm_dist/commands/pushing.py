"""`push`: a run's model to the Hub."""

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from clm_dist import recipe
from clm_dist.commands.common import refuse_launcher, run_of
from clm_dist.config import HubConfig
from clm_dist.errors import ConfigError, RunError, UserError

PAUSES = (1, 2, 4, 8)  # seconds before the next try


def push(args: argparse.Namespace) -> None:
    """What waits in the outbox, or a model that is put into it now; in the foreground."""
    refuse_launcher("push")
    run, config = run_of(args.run)
    given = {name: getattr(args, name) for name in ("repo", "private", "branch", "replace")}
    given = {name: value for name, value in given.items() if value is not None}
    settings = _settings(config.publish.hub, given)
    from clm_dist.publish import hub_queue
    from clm_dist.publish.hub import Hub

    if args.what is not None or not hub_queue.waiting(run):
        what = args.what or "model"
        hub_queue.queue(run, run / what, what, settings)
    for item in hub_queue.waiting(run):
        hub_queue.change(run, replace(item, **given))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    _deliver(Hub(run, config), run)


def _deliver(hub: Any, run: Path) -> None:
    for pause in (*PAUSES, None):
        try:
            hub.deliver()
            return
        except UserError:
            raise
        except Exception as error:  # of whatever library: it may go well the next time
            reason = " ".join(str(error).split()) or type(error).__name__
            if pause is None:
                raise RunError(f"{reason}; it waits in {run}/outbox, the same command goes on") from error
            print(f"{reason}; trying again in {pause} s", flush=True)
            time.sleep(pause)


def _settings(hub: HubConfig, given: dict[str, Any]) -> HubConfig:
    """The recipe's, with what the command line says."""
    values = hub.model_dump() | given
    problems = recipe.problems_of_section(HubConfig, "publish.hub", values)
    if problems:
        raise ConfigError(problems)
    settings = HubConfig.model_validate(values)
    if settings.repo is None:
        raise UserError("push where? the recipe names no publish.hub.repo; give --repo owner/name")
    return settings
