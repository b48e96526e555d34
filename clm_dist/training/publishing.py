"""What is said of an exported model, and which exports are put into the outbox for the Hub. On the main process only."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from clm_dist.config import Config
from clm_dist.hub import commit_of
from clm_dist.ledger.ledger import first_chain
from clm_dist.model import lora
from clm_dist.model.configuration import away_from_home
from clm_dist.publish.card import model_card, public_values
from clm_dist.publish.hub import git_oid
from clm_dist.publish.hub_check import announcement, check_push
from clm_dist.publish.hub_queue import FACTS, is_known, queue, read_facts
from clm_dist.publish.report import loss_picture, read_rows
from clm_dist.training import run_folder
from clm_dist.training.job import Job
from clm_dist.training.state import TrainState

RUN_ID = 16  # letters of the first chain of a ledger: which run a model is of


def check_hub(config: Config, overwrite: bool) -> None:
    """Refuses a push that cannot work, and says what will be pushed. Asks the Hub, on the first process alone."""
    hub = config.publish.hub
    if hub.repo is None or os.environ.get("RANK", "0") != "0":
        return
    print(announcement(hub), flush=True)
    run = None if overwrite else first_chain(Path(config.run_dir) / "ledger.jsonl")
    problem = check_push(hub, run and run[:RUN_ID])
    if problem is not None:
        print(
            f"publish: not checked now ({problem}); what cannot be pushed waits in {config.run_dir}/outbox", flush=True
        )


def pages(
    accelerator: Accelerator, config: Config, job: Job, state: TrainState, figures: dict[str, Any]
) -> dict[str, bytes]:
    """The card, its picture and the figures as JSON, by name: what stands beside the weights.

    figures: `parameters`, `engine`; of a model with adapters `trained`, `adapters`.
    """
    run, manifest = Path(config.run_dir), job.manifest
    rows = read_rows(run / "metrics.jsonl")
    evaluation = state.evaluation if state.evaluated == state.step else {}
    measured = {key: value for key, value in evaluation.items() if math.isfinite(value)}
    facts = {
        "step": state.step,
        "tokens_seen": state.step * job.plan.tokens_per_step,
        "arithmetic": str(job.plan),
        **figures,
    }
    prepared = {"tokenizer": manifest.tokenizer, "hub_ids": manifest.hub_ids(), **manifest.splits}
    model = config.model
    base = commit_of(model.name, model.revision, "config.json") if model.name else None
    environment = run_folder.environment(accelerator)
    shown = {**measured, **facts, "away": away_from_home(job.model_configuration)}
    card = model_card(config, shown, environment, prepared, rows, base).encode()
    identity = {"run": (first_chain(run / "ledger.jsonl") or "")[:RUN_ID], "learned": state.consumed}
    facts = {**identity, **facts, "metrics": measured, "card": git_oid(card)}
    return {
        "README.md": card,
        "curves.png": loss_picture(rows),
        FACTS: (json.dumps(facts, indent=2) + "\n").encode(),
    }


def adapter(config: Config, plain: Any, weights: dict[str, Any]) -> dict[str, bytes]:
    """The adapter's own files, in a folder beside the merged weights: peft's format. weights: all, as they are live."""
    model = config.model
    # a page is public, a path is not
    of = None if model.from_scratch or model.name is None else public_values(model.name)
    commit = commit_of(str(model.name), model.revision, "config.json") if of else None
    return lora.adapter_files(plain, weights, of, commit)


def queue_push(config: Config, folder: Path, what: str) -> str | None:
    """Puts an exported model into the outbox, unless it waits there or was delivered; returns what went wrong, if anything.

    Whatever that is, training goes on: the model stays in the run folder.
    """
    run, hub = Path(config.run_dir), config.publish.hub
    try:
        if not is_known(run, read_facts(folder), what, str(hub.repo)):
            queue(run, folder, what, hub)
    except Exception as error:  # a full disk, a folder that vanished: of no weight for what is learned
        return f"hub: cannot put {folder} into the outbox ({type(error).__name__}: {error}); `clm-dist push {run}` can later"
    return None


def drop(folder: Path) -> None:
    """Removes an export that was made only to be pushed."""
    shutil.rmtree(folder, ignore_errors=True)
