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
from clm_dist.data.order import blocks_at, micro_batches, step_seed
from clm_dist.model.build import build_model
from clm_dist.model.isolation import check_isolation
from clm_dist.model.loss import next_token_nll
from clm_dist.training import run_folder
from clm_dist.training.batches import Batch, Batches
from clm_dist.training.job import Job, open_job
from clm_dist.training.keeper import Keeper
from clm_dist.training.observer import Observer
from clm_dist.training.optimizer import make_optimizer, set_lr
from clm_dist.training.plan import Plan
from clm_dist.training.runtime import finish, settle_buckets, start
from clm_dist.training.schedule import lr_at
from clm_dist.watch.watch import Watch


def train(config: Config, overwrite: bool = False, watch: Watch | None = None) -> None:
    """Trains, evaluates and exports, or goes on with that. Every rank must call this."""
    watch = watch or Watch()
    job = open_job(config, overwrite)
    plan = job.plan
    if job.finished:
        if watch.rank == 0:
            print(f"{config.run_dir} is finished; --overwrite trains it again, another run_dir keeps both", flush=True)
        return
    accelerator = start(config.train.mixed_precision)
    with run_folder.joined(config, accelerator, watch):
        model = build_model(config.model, job.model_configuration, config.seed)
        model.config.use_cache = False  # type: ignore[union-attr]  # a cache of keys and values serves generation only
        if config.train.isolate_documents:
            check_isolation(model, plan.block_size, str(config.model.name or config.model.type))
        model, optimizer = accelerator.prepare(model, make_optimizer(model, config.optim))
        keeper = Keeper(accelerator, config, job, model, optimizer, watch)
        keeper.restore()
        settle_buckets(model, accelerator.device, plan.block_size)
        observer = Observer(accelerator, config, job, model, keeper)
        observer.begin()
        loop(accelerator, config, job, model, optimizer, keeper, observer)
        keeper.end(close=observer.close)
        observer.end()
        finish(accelerator)


def loop(
    accelerator: Accelerator, config: Config, job: Job, model: Any, optimizer: Any, keeper: Keeper, observer: Observer
) -> None:
    """One turn is one optimizer update. Ends with the last step, or when all ranks agreed to leave."""
    plan, state, watch = job.plan, keeper.state, keeper.watch
    batches = Batches(job.train_blocks, config.train.isolate_documents, accelerator.device)
    while state.step < plan.max_steps and not keeper.leaving:
        model.train()
        lr = lr_at(state.step, plan.max_steps, config.optim)
        set_lr(optimizer, lr)
        blocks = blocks_at(state.cursor, plan.global_batch_size, plan.num_blocks, config.seed)  # of all ranks
        scored_tokens = max(1, batches.count(blocks))
        step_nll = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for micro_step, batch in enumerate(window(batches, blocks, plan, accelerator, watch)):
            if micro_step and keeper.agreement.tick():
                break
            with gradients_of(micro_step, accelerator, model, plan):
                torch.manual_seed(dropout_seed(config.seed, state.step, micro_step, accelerator))
                nll = next_token_nll(model(**batch.inputs()).logits, batch.input_ids, batch.scored).sum()
                # DDP averages over ranks; we want the sum over the tokens of all of them
                accelerator.backward(nll * (plan.world_size / scored_tokens))
            step_nll += nll.detach()
        if keeper.leaving:  # in the midst of a step, which is then done again
            break
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm or float("inf"))
        verdict = keeper.verdict(step_nll, grad_norm, batches, scored_tokens)
        if verdict == "update":
            optimizer.step()
        optimizer.zero_grad()
        if verdict == "rewind":
            continue
        keeper.advance(verdict)
        observer.after_step(lr, grad_norm)


def window(batches: Batches, blocks: np.ndarray, plan: Plan, accelerator: Accelerator, watch: Watch) -> Iterator[Batch]:
    """This rank's micro-batches of a step, on the device: each of B blocks."""
    batches.begin()
    mine = micro_batches(blocks, accelerator.process_index, plan.world_size, plan.micro_batch_size)
    for micro_step, indices in enumerate(mine):
        watch.at("data", micro_step)
        batch = batches.batch(indices)
        watch.at("forward and backward")
        yield batch


def gradients_of(micro_step: int, accelerator: Accelerator, model: torch.nn.Module, plan: Plan) -> Any:
    """Ranks exchange gradients in the last micro-step only; before it each sums its own."""
    last = micro_step == plan.gradient_accumulation_steps - 1
    return nullcontext() if last else accelerator.no_sync(model)


def dropout_seed(seed: int, step: int, micro_step: int, accelerator: Accelerator) -> int:
    """Dropout is a function of (seed, step, place in the global batch): with one micro_batch_size every world size draws
    the same masks, and there is no state to restore."""
    return step_seed(seed, step, micro_step * accelerator.num_processes + accelerator.process_index)
