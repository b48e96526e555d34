"""Wrong idioms from public examples, each in the place of our own, each as its users write it."""

import math

import torch
from accelerate import Accelerator, PartialState

import clm_dist.training.observer as observing
import clm_dist.training.train as training
from clm_dist.data.order import micro_batches
from clm_dist.engine.replicated import Replicated
from clm_dist.engine.zero import Zero
from clm_dist.model import kernels
from clm_dist.model.objective import Objective
from clm_dist.training.batches import Batches
from clm_dist.training.evaluate import Evaluation


def apply(name: str | None) -> None:
    """Puts the named mutant in place; None leaves the program as it is."""
    if name is not None:
        {
            "prepared_scheduler": prepared_scheduler,
            "repeat_evaluation": repeat_evaluation,
            "window_count": window_count,
            "per_rank_mean": per_rank_mean,
            "tokens_by_rank": tokens_by_rank,
            "divided_twice": divided_twice,
            "clipped_at_one": clipped_at_one,
            "always_a_boundary": always_a_boundary,
            "get_state_dict": get_state_dict,
            "gathered_at_once": gathered_at_once,
            "last_chunk_only": last_chunk_only,
        }[name]()


def prepared_scheduler() -> None:
    """A LambdaLR given to `accelerator.prepare`: it steps once per process per update."""
    made: dict[str, object] = {}
    original = training.lr_at

    def stepped(engine: Replicated, lr: float) -> None:
        if not made:
            shape = lambda step: max(0.0, 1 - step / made["max_steps"])  # noqa: E731
            made["max_steps"] = made_max_steps[0]
            scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, shape)
            made["scheduler"] = Accelerator().prepare_scheduler(scheduler)
        else:
            made["scheduler"].step()

    made_max_steps = []

    def noted(step: int, max_steps: int, optim: object) -> float:
        made_max_steps.append(max_steps)
        return original(step, max_steps, optim)

    training.lr_at = noted
    Replicated.set_lr = stepped


def repeat_evaluation() -> None:
    """`gather_for_metrics(loss.repeat(batch_size))` and a mean over what came: the no-trainer examples' evaluation."""

    def evaluate(accelerator, model, objective, batches, micro_batch_size, tokens_per_byte, leave, sharded):
        blocks = batches.blocks
        rows = torch.from_numpy(blocks[list(range(len(blocks)))].astype("int64"))
        loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=micro_batch_size))
        model.eval()
        losses = []
        for batch in loader:
            with torch.no_grad():
                loss = model(input_ids=batch, labels=batch).loss
            losses.append(accelerator.gather_for_metrics(loss.repeat(micro_batch_size)))
        loss = torch.cat(losses).mean().item()
        tokens = len(rows) * (rows.shape[1] - 1)
        assert math.isfinite(loss)
        return Evaluation(nll=loss * tokens, tokens=tokens, correct=0, tokens_per_byte=tokens_per_byte)

    observing.evaluate = evaluate


def window_count() -> None:
    """Accelerate's documented accumulation over a prepared loader: each micro-batch's mean divided by the number of
    accumulation steps, and an update at the end of the epoch whether the window is full or not."""

    def noted(cursor, global_batch_size, num_blocks, seed):
        now[:] = cursor // global_batch_size, seed
        return order_of(cursor, global_batch_size, num_blocks, seed)

    def window(batches, _, plan, rank, watch):
        step, seed = now
        updates = -(-plan.num_blocks // plan.global_batch_size)
        epoch, within = divmod(step, updates)
        order = torch.randperm(plan.num_blocks, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        rows = order[within * plan.global_batch_size : (within + 1) * plan.global_batch_size]
        micro = [rows[i : i + plan.micro_batch_size] for i in range(0, len(rows), plan.micro_batch_size)]
        micro = micro[rank :: plan.world_size] or [rows[:1]]
        for indices in micro:
            # `scored_tokens` below is that of a full step: turn the sum into mean / accumulation steps
            scale[0] = plan.micro_batch_size / len(indices)
            yield batches.batch(indices)

    scale, now = [1.0], [0, 0]
    original, order_of = Objective.summed, training.blocks_at
    Objective.summed = lambda self, *batch: original(self, *batch) * scale[0]
    training.blocks_at = noted
    training.window = window


def per_rank_mean() -> None:
    """The sum over all ranks left to DDP's average: gradients come out world_size times too small."""
    original = Accelerator.backward
    Accelerator.backward = lambda self, loss: original(self, loss / self.num_processes)


def tokens_by_rank() -> None:
    """A mean over each rank's own tokens, and DDP's mean of these means: right only while all ranks have as many."""
    original = Batches.count

    def count(self, indices):
        state = PartialState()
        [mine] = micro_batches(indices, state.process_index, state.num_processes, len(indices) // state.num_processes)
        return original(self, mine) * state.num_processes

    Batches.count = count


def divided_twice() -> None:
    """DeepSpeed's own backward, which divides by the accumulation steps a loss that is divided already."""
    Zero.backward = lambda self, loss: self.model.backward(loss)


def last_chunk_only() -> None:
    """A chunk's gradient of the head's weights written where it should be added."""
    kernels.add_product = lambda total, d_logits, x: total.copy_(d_logits.T @ x)


def clipped_at_one() -> None:
    """`"gradient_clipping": "auto"` left to Accelerate: 1.0, whatever `clip_grad_norm_` is told."""
    original = training.check_live

    def check_live(wanted, engine, config):
        original(wanted, engine, config)  # which would have refused it
        engine.zero.clip_grad = 1.0

    training.check_live = check_live


def always_a_boundary() -> None:
    """Every micro-step is the last of its step: Accelerate's wrapper where nobody calls `accumulate`."""
    original = Zero.micro_step
    Zero.micro_step = lambda self, last: original(self, True)


def get_state_dict() -> None:
    """`accelerator.get_state_dict(model)`: the whole model at once."""

    def full_weights(self):
        held = self.accelerator.get_state_dict(self.model)
        for name in self.plain.state_dict():
            yield name, held[name] if self.accelerator.is_main_process else None

    Zero.full_weights = full_weights


def gathered_at_once() -> None:
    """`GatheredParameters(model.parameters())` around a `state_dict()`: every rank holds the whole model."""

    def full_weights(self):
        from deepspeed import zero

        with zero.GatheredParameters(list(self.plain.parameters())):
            for name, tensor in self.plain.state_dict().items():
                yield name, tensor.clone() if self.accelerator.is_main_process else None

    Zero.full_weights = full_weights
