"""`train`: one turn of the loop is one optimizer update.

Legend: B micro_batch_size, T block_size.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from clm_dist.config import Config
from clm_dist.data.order import blocks_at, micro_batches, step_seed
from clm_dist.engine.engine import Engine
from clm_dist.engine.make import make_engine
from clm_dist.model import lora
from clm_dist.model.build import build_model
from clm_dist.model.checkpointing import checkpoint_activations
from clm_dist.model.compiled import compile_if_asked
from clm_dist.model.configuration import idle_experts
from clm_dist.model.transformers_versions import without_looking_at_batches
from clm_dist.training import run_folder
from clm_dist.training.batches import Batch, Batches
from clm_dist.training.determinism import same_bits
from clm_dist.training.gate import Opened
from clm_dist.training.job import Job, open_job
from clm_dist.training.keeper import Keeper
from clm_dist.training.observer import Observer
from clm_dist.training.optimizer import make_optimizer
from clm_dist.training.plan import Plan
from clm_dist.training.proof import prove
from clm_dist.training.publishing import check_hub
from clm_dist.training.runtime import finish, start
from clm_dist.training.schedule import lr_at
from clm_dist.training.sharding import check_live
from clm_dist.watch.watch import Watch


def train(config: Config, overwrite: bool = False, watch: Watch | None = None, opened: Opened | None = None) -> None:
    """Trains, evaluates and exports, or goes on with that. Every rank must call this. opened: what was let in already."""
    watch = watch or Watch()
    job = open_job(config, overwrite, opened=opened)
    plan = job.plan
    if job.finished:
        if watch.rank == 0:
            print(f"{config.run_dir} is finished; --overwrite trains it again, another run_dir keeps both", flush=True)
        return
    check_hub(config, overwrite)
    accelerator = start(config.train.mixed_precision, job.sharding.settings, idle_experts(job.model_configuration))
    with run_folder.joined(config, accelerator, watch):
        model = build_model(config.model, job.model_configuration, config.seed, job.manifest.vocab_size)
        base = lora.base_sha256(model) if config.model.lora and accelerator.is_main_process else None
        model.config.use_cache = False  # type: ignore[union-attr]  # a cache of keys and values serves generation only
        checkpoint_activations(model, config.train.activation_checkpointing)
        objective = prove(
            config, model, config.model.called, accelerator.device, stays=job.sharding.kind == "replicated"
        )
        told = [compile_if_asked(config.train, model, accelerator.device.type, job.sharding.kind)]
        optimizer = make_optimizer(model, config.optim)
        clip, given = config.optim.max_grad_norm, lora.given(model)
        engine = make_engine(job.sharding.kind, accelerator, model, optimizer, clip, objective, given)
        check_live(job.sharding, engine, config)
        keeper = Keeper(accelerator, config, job, engine, watch, base)
        keeper.restore()
        with without_looking_at_batches(one_document_a_row=not config.train.isolate_documents):
            told += settle(config, plan, engine)
            observer = Observer(accelerator, config, job, engine, keeper, told)
            observer.begin()
            loop(config, job, engine, keeper, observer)
        keeper.end(close=observer.close)
        observer.end()
        finish(accelerator)


def settle(config: Config, plan: Plan, engine: Engine) -> list[str | None]:
    """What a start does before its first step, and what to say of it. Every rank must call this."""
    size = plan.micro_batch_size, plan.block_size
    with same_bits(config.train.deterministic):
        engine.settle(*size)
        return [engine.capture(config.train, *size, accumulates=plan.gradient_accumulation_steps > 1)]


def loop(config: Config, job: Job, engine: Engine, keeper: Keeper, observer: Observer) -> None:
    """One turn is one optimizer update. Ends with the last step, or when all ranks agreed to leave."""
    plan, state = job.plan, keeper.state
    batches = Batches(job.train_blocks, config.train.isolate_documents, engine.accelerator.device)
    engine.model.train()  # once, since it walks over all modules; evaluation and sampling leave it as it was
    while state.step < plan.max_steps and not keeper.leaving:
        lr = lr_at(state.step, plan.max_steps, config.optim)
        engine.set_lr(lr)
        step_nll, scored_tokens = accumulate(
            config, job, engine, batches, state.step, state.cursor, keeper.watch, leave=keeper.agreement.tick
        )
        if keeper.leaving:  # in the midst of a step, which is then done again
            break
        grad_norm = engine.gradient_norm()
        sums = keeper.sum_up(step_nll, grad_norm, batches)
        ahead = keeper.update_ahead(sums)
        if state.step + 1 < plan.max_steps:
            prefetch(config, job, engine, batches, state.cursor + plan.global_batch_size)
        verdict = keeper.verdict(sums, step_nll, batches, scored_tokens)
        if not ahead:
            engine.step(update=verdict == "update")
        if verdict == "rewind":
            continue
        keeper.advance(verdict)
        observer.after_step(lr, grad_norm)


def accumulate(
    config: Config,
    job: Job,
    engine: Engine,
    batches: Batches,
    step: int,
    cursor: int,
    watch: Watch,
    leave: Callable[[], bool],
) -> tuple[torch.Tensor, int]:
    """The gradients of one step, over this rank's micro-batches. Every rank must call this.

    Returns this rank's summed nats, (), and the scored tokens of all ranks. leave: asked between micro-batches.
    """
    plan, rank = job.plan, engine.accelerator.process_index
    blocks = blocks_at(cursor, plan.global_batch_size, plan.num_blocks, config.seed)  # of all ranks
    scored_tokens = max(1, batches.count(blocks))
    step_nll = torch.zeros((), dtype=torch.float64, device=engine.accelerator.device)
    for micro_step, batch in enumerate(window(batches, blocks, plan, rank, watch)):
        if micro_step and leave():
            break
        last = micro_step == plan.gradient_accumulation_steps - 1
        with engine.micro_step(last), same_bits(config.train.deterministic):
            torch.manual_seed(dropout_seed(config.seed, step, micro_step, plan, rank))
            # ranks are averaged over; we want the sum over the tokens of all of them
            step_nll += engine.learn(batch.inputs(), batch.scored, plan.world_size / scored_tokens)
    return step_nll, scored_tokens


def prefetch(config: Config, job: Job, engine: Engine, batches: Batches, cursor: int) -> None:
    """The first micro-batch of the step that begins at `cursor`, while a GPU has an update to do."""
    plan, rank = job.plan, engine.accelerator.process_index
    blocks = blocks_at(cursor, plan.global_batch_size, plan.num_blocks, config.seed)
    batches.prefetch(micro_batches(blocks, rank, plan.world_size, plan.micro_batch_size)[0])


def window(batches: Batches, blocks: np.ndarray, plan: Plan, rank: int, watch: Watch) -> Iterator[Batch]:
    """This rank's micro-batches of a step, on the device: each of B blocks."""
    batches.begin()
    mine = micro_batches(blocks, rank, plan.world_size, plan.micro_batch_size)
    for micro_step, indices in enumerate(mine):
        watch.at("data", micro_step)
        batch = batches.batch(indices)
        watch.at("forward and backward")
        yield batch


def dropout_seed(seed: int, step: int, micro_step: int, plan: Plan, rank: int) -> int:
    """Dropout is a function of (seed, step, place in the global batch): with one micro_batch_size every world size draws
    the same masks, and there is no state to restore."""
    return step_seed(seed, step, micro_step * plan.world_size + rank)
