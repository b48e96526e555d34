"""Whether a step's numbers are good enough to learn from. Pure: agreed numbers in, the same verdict on every rank out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clm_dist.config import TrainConfig

WINDOW = 64  # losses that say what is usual
ENOUGH = 16  # fewer say nothing


@dataclass(frozen=True)
class Verdict:
    """What to do about a step, and why."""

    action: Literal["update", "stop", "skip", "rewind"]
    cause: str = ""


def judge(loss: float, gradients_finite: bool, losses: Sequence[float], train: TrainConfig) -> Verdict:
    """loss: nats per token of the whole global step. losses: those of the steps before it, newest last."""
    if not math.isfinite(loss):
        return Verdict(train.on_nonfinite, f"the loss is {loss}")
    if not gradients_finite:
        return Verdict(train.on_nonfinite, f"the gradient is not finite (the loss is {loss:.4f})")
    if train.on_spike != "ignore" and len(losses) >= ENOUGH:
        mean = math.fsum(losses) / len(losses)
        spread = math.sqrt(math.fsum((one - mean) ** 2 for one in losses) / len(losses))
        limit = mean + train.spike_deviations * max(spread, 0.01 * mean)  # a flat curve must not make noise a spike
        if loss > limit:
            cause = f"the loss {loss:.4f} is above {limit:.4f}: {mean:.4f} + {train.spike_deviations:g} deviations"
            return Verdict(train.on_spike, cause)
    return Verdict("update")


def remember(losses: list[float], loss: float) -> None:
    """Adds a loss that was learned from."""
    losses.append(loss)
    del losses[:-WINDOW]
