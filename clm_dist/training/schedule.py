"""The learning rate as a pure function of the step: nothing to save, nothing to prepare, the same at every world size.

A scheduler given to `accelerator.prepare` steps once per process per update and so runs world_size times too fast.
"""

import math

from clm_dist.config import OptimConfig


def lr_at(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Learning rate of update `step` (0 is the first)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * _shape(step, max_steps, optim)


def _shape(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Share of the way from floor to peak after warm-up, in [0, 1]."""
    match optim.schedule:
        case "constant":
            return 1.0
        case "wsd":  # warm-up, stable, decay: arXiv:2404.06395, section 4
            assert optim.decay_steps is not None  # checked with the recipe
            return min(1.0, (max_steps - step) / optim.decay_steps)
        case "linear":
            return (max_steps - step) / (max_steps - optim.warmup_steps)
        case "cosine":  # arXiv:1608.03983, one period without restarts
            progress = (step - optim.warmup_steps) / (max_steps - optim.warmup_steps)
            return (1 + math.cos(math.pi * progress)) / 2
