"""`train`: one turn of the loop is one optimizer update.

Legend: B micro_batch_size, T block_size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from clm_dist.config import Config
from clm_dist.data.order import global_batch, micro_batches, step_seed
from clm_dist.model.build import build_model
from clm_dist.model.isolation import check_isolation
from clm_dist.model.loss import next_token_nll
from clm_dist.training.batches import Batch, Batches
from clm_dist.training.job import open_job
from clm_dist.training.meter import Meter
from clm_dist.training.observer import Observer
from clm_dist.training.optimizer import make_optimizer, set_lr
from clm_dist.training.plan import Plan
from clm_dist.training.runtime import finish, start
from clm_dist.training.schedule import lr_at


def train(config: Config, overwrite: bool = False) -> None:
    """Trains, evaluates and exports. Every rank must call this."""
    job = open_job(config, overwrite)
    plan = job.plan
    accelerator = start(config.train.mixed_precision)
    model = build_model(config.model, job.model_configuration, config.seed)
    model.config.use_cache = False  # type: ignore[union-attr]  # a cache of keys and values serves generation only
    if config.train.isolate_documents:
        check_isolation(model, plan.block_size, str(config.model.name or config.model.type))
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config.optim))
    meter = Meter(accelerator, plan)
    observer = Observer(accelerator, config, job, model, meter)
    observer.begin()
    batches = Batches(job.train_blocks, config.train.isolate_documents, accelerator.device)

    for step in range(plan.max_steps):  # one turn = one optimizer update
        model.train()
        lr = lr_at(step, plan.max_steps, config.optim)
        set_lr(optimizer, lr)
        blocks = global_batch(step, plan.global_batch_size, plan.num_blocks, config.seed)  # of all ranks
        scored_tokens = max(1, batches.count(blocks))
        for micro_step, batch in enumerate(window(batches, blocks, plan, accelerator)):
            with gradients_of(micro_step, accelerator, model, plan):
                torch.manual_seed(dropout_seed(config.seed, step, micro_step, accelerator))
                nll = next_token_nll(model(**batch.inputs()).logits, batch.input_ids, batch.scored).sum()
                # DDP averages over ranks; we want the sum over the tokens of all of them
                accelerator.backward(nll * (plan.world_size / scored_tokens))
            meter.add(nll)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        meter.end_step(scored_tokens)
        observer.after_step(step + 1, lr, grad_norm)

    observer.end()
    finish(accelerator)


def window(batches: Batches, blocks: np.ndarray, plan: Plan, accelerator: Accelerator) -> Iterator[Batch]:
    """This rank's micro-batches of a step, on the device: each of B blocks."""
    for indices in micro_batches(blocks, accelerator.process_index, plan.world_size, plan.micro_batch_size):
        yield batches.batch(indices)


def gradients_of(micro_step: int, accelerator: Accelerator, model: torch.nn.Module, plan: Plan) -> Any:
    """Ranks exchange gradients in the last micro-step only; before it each sums its own."""
    last = micro_step == plan.gradient_accumulation_steps - 1
    return nullcontext() if last else accelerator.no_sync(model)


def dropout_seed(seed: int, step: int, micro_step: int, accelerator: Accelerator) -> int:
    """Dropout is a function of (seed, step, place in the global batch): with one micro_batch_size every world size draws
    the same masks, and there is no state to restore."""
    return step_seed(seed, step, micro_step * accelerator.num_processes + accelerator.process_index)
