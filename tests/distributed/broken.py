"""The program under test with a promise broken, for `clm-dist check` to find: CLM_DIST_BREAK names which.

Each is an idiom that is in use: found in public training scripts, or what a library does when it is left alone.
"""

import os
import sys

import clm_dist.training.check as checking
import clm_dist.training.train as training
from clm_dist.cli import main
from clm_dist.engine.engine import Engine
from clm_dist.engine.replicated import Replicated
from clm_dist.engine.zero import Zero
from clm_dist.model.objective import Objective
from clm_dist.training.batches import Batches


def accumulation_steps_only() -> None:
    """The gradient of each micro-batch's own mean over accumulation steps: right where all have as many tokens."""
    nll_of, count = Objective.summed, Batches.count
    of_step, of_micro_batch = [1.0], [1.0]

    def nll(self, model, inputs, scored=None):
        of_micro_batch[0] = inputs["input_ids"][:, 1:].numel() if scored is None else float(scored.sum())
        return nll_of(self, model, inputs, scored)

    def noted(self, indices):
        of_step[0] = count(self, indices)
        return of_step[0]

    def wrong(original):
        def backward(self, loss):
            world_size, steps = self.accelerator.num_processes, int(os.environ["CLM_DIST_ACCUMULATION"])
            original(self, loss * (of_step[0] / world_size / steps / of_micro_batch[0]))

        return backward

    Objective.summed, Batches.count = nll, noted
    for engine in (Replicated, Zero):
        engine.backward = wrong(engine.backward)


def all_tokens_count() -> None:
    """Padding divided by as if it were scored: the number of tokens is that of the batch's shape."""
    Batches.count = lambda self, indices: len(indices) * (self.blocks.block_size - 1)


def scheduler_of_each_process() -> None:
    """The schedule goes on by the number of processes with each update, as a prepared scheduler does."""
    original = training.lr_at
    world_size = int(os.environ["WORLD_SIZE"])
    Engine.set_lr = lambda self, lr: (
        [group.update(lr=original(now.pop(), *rest.pop())) for group in self.optimizer.param_groups] and None
    )
    now, rest = [], []

    def noted(step, max_steps, optim):
        # every group asks once
        now.extend([step * world_size] * 2)
        rest.extend([(max_steps, optim)] * 2)
        return original(step, max_steps, optim)

    training.lr_at = noted


def clipping_left_to_auto() -> None:
    """DeepSpeed's `auto` is 1.0; DDP's counterpart is a `clip_grad_norm_` at 1.0 that stands in the script."""
    original = checking.make_engine

    def make_engine(kind, accelerator, model, optimizer, max_norm, objective):
        engine = original(kind, accelerator, model, optimizer, 1.0, objective)
        if kind == "zero":
            engine.zero.clip_grad = 1.0
        return engine

    checking.make_engine = make_engine
    checking.check_live = lambda *_: None  # which would say so before a step is taken


def data_of_another_rank() -> None:
    """Every rank reads what rank 0 should: a sampler that was not given its rank."""
    original = training.window

    def window(batches, blocks, plan, rank, watch):
        return original(batches, blocks, plan, 0, watch)

    training.window = window


if __name__ == "__main__":
    if name := os.environ.get("CLM_DIST_BREAK"):
        globals()[name]()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the real entry point does under a launcher
