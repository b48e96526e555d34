"""`replay`: an offending step again, in one process: which micro-batch, which blocks, which parameter."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from clm_dist import recipe
from clm_dist.checkpoint import content
from clm_dist.checkpoint.saved import Saved
from clm_dist.data.order import blocks_at, micro_batches, step_seed
from clm_dist.data.prepared import open_blocks, open_prepared
from clm_dist.data.tokenize import load_tokenizer, token_ids
from clm_dist.errors import UserError
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration
from clm_dist.model.objective import Objective, find_objective
from clm_dist.training import offence
from clm_dist.training.batches import Batches
from clm_dist.training.runtime import start


def replay(run: Path, step: int) -> list[str]:
    """Every micro-batch of the step as its rank computed it: same weights, blocks, dropout. Returns the lines of a table."""
    place = offence.folder(run, step)
    if not (place / offence.BATCH).is_file():
        kept = sorted(path.name for path in place.parent.glob("step-*")) if place.parent.is_dir() else []
        raise UserError(f"{run} keeps no offending step {step}; kept: {', '.join(kept) or 'none'}")
    kept_batch = json.loads((place / offence.BATCH).read_text(encoding="utf-8"))
    config = recipe.load(place / "config.yaml", [])
    manifest = open_prepared(config)
    tokenizer = load_tokenizer(str(Path(config.data.prepared_dir) / "tokenizer"))
    accelerator = start(config.train.mixed_precision)
    random_weights = config.model.model_copy(update={"from_scratch": config.model.name is not None})
    model = build_model(random_weights, model_configuration(random_weights, token_ids(tokenizer)), config.seed)
    model.config.use_cache = False  # type: ignore[union-attr]
    content.load_weights(model, Saved([place / offence.WEIGHTS]))
    objective = find_objective(model, config.train.chunked_loss)
    model = accelerator.prepare_model(model).train()
    batches = Batches(open_blocks(config, manifest, "train"), config.train.isolate_documents, accelerator.device)
    world_size, size = kept_batch["world_size"], kept_batch["micro_batch_size"]
    cursor, count = kept_batch["cursor"], kept_batch["global_batch_size"]
    blocks = blocks_at(cursor, count, kept_batch["num_blocks"], config.seed)
    lines = [f"step {step}: {kept_batch['cause']}", "rank  micro-step  loss (nats/token)  gradient  blocks"]
    for rank in range(world_size):
        for micro_step, indices in enumerate(micro_batches(blocks, rank, world_size, size)):
            torch.manual_seed(step_seed(config.seed, step - 1, micro_step * world_size + rank))
            loss, worst = _one(accelerator, model, objective, batches, indices)
            numbers = ", ".join(map(str, indices.tolist()))
            lines.append(f"{rank:>4}  {micro_step:>10}  {loss:>17.6g}  {worst}  {numbers}")
    return lines


def _one(
    accelerator: Accelerator, model: torch.nn.Module, objective: Objective, batches: Batches, indices: np.ndarray
) -> tuple[float, str]:
    """The loss of a micro-batch and the first parameter whose gradient is not finite."""
    batch = batches.batch(indices)
    nll = objective.summed(model, batch.inputs(), batch.scored)
    accelerator.backward(nll)
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    model.zero_grad()
    return nll.item() / max(1, batches.count(indices)), f"not finite in {bad[0]}" if bad else "finite"
