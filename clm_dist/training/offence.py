"""A step whose numbers were bad: its batch and the weights that met it, kept for `clm-dist replay`."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from clm_dist import recipe
from clm_dist.checkpoint import content, tensors
from clm_dist.config import Config
from clm_dist.engine.engine import Engine
from clm_dist.training.plan import Plan
from clm_dist.training.state import TrainState

MOST = 8  # kept with their weights; a run that skips thousands must not fill the disk
BATCH, WEIGHTS = "batch.json", "model.safetensors"


def folder(run: Path, step: int) -> Path:
    """Where an offending step is kept; after a rewind the same step may offend again, with other data."""
    return run / "offending" / f"step-{step:08d}"


def keep(
    accelerator: Accelerator,
    config: Config,
    engine: Engine,
    state: TrainState,
    plan: Plan,
    nll: torch.Tensor,
    cause: str,
) -> str:
    """Writes down the step under way, before its update; returns the cause with the ranks at fault. Every rank must call
    this."""
    ranks = accelerator.gather(nll.detach().double().reshape(1)).tolist()
    bad = [str(rank) for rank, one in enumerate(ranks) if not math.isfinite(one)]
    if bad:
        cause += f" (that of rank {', '.join(bad)} of {len(ranks)})"
    once = content.weights(engine.plain)  # tied ones by their first name
    weights = {name: tensor for name, tensor in engine.full_weights() if tensor is not None and name in once}
    if accelerator.is_main_process:
        try:
            _write(config, weights, state, plan, ranks, cause)
        except OSError as error:  # what is to be done about the step does not depend on it
            print(f"the batch of step {state.step + 1} could not be kept: {error}", flush=True)
    return cause


def _write(
    config: Config, weights: dict[str, Any], state: TrainState, plan: Plan, ranks: list[float], cause: str
) -> None:
    place = folder(Path(config.run_dir), state.step + 1)
    if (place / BATCH).exists() or (place.parent.is_dir() and len(list(place.parent.iterdir())) >= MOST):
        return
    shutil.rmtree(place, ignore_errors=True)  # half of one, which a kill left
    place.mkdir(parents=True)
    batch = {
        "step": state.step + 1,
        "cursor": state.cursor,
        "world_size": plan.world_size,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "global_batch_size": plan.global_batch_size,
        "num_blocks": plan.num_blocks,
        "cause": cause,
        "nll_of_ranks": [str(one) for one in ranks],  # text: JSON has no NaN
    }
    (place / "config.yaml").write_text(recipe.dump(config), encoding="utf-8")
    tensors.save(place / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in weights.items()})
    (place / BATCH).write_text(json.dumps(batch, indent=1) + "\n", encoding="utf-8")
