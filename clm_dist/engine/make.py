"""The engine of a kind."""

import torch
from accelerate import Accelerator

from clm_dist.engine.engine import Engine
from clm_dist.model.objective import Objective


def make_engine(
    kind: str,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
    objective: Objective,
    given: frozenset[str] = frozenset(),
) -> Engine:
    """Gives the model to whatever the processes were started for. max_norm: to clip at. objective: what of it is learned.
    given: names of frozen weights that checkpoints leave out. Every rank must call this."""
    engine = _made(kind, accelerator, model, optimizer, max_norm)
    engine.objective = objective
    engine.given = given
    return engine


def _made(
    kind: str,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
) -> Engine:
    if kind == "zero":
        from clm_dist.engine.zero import Zero

        return Zero(accelerator, model, optimizer)
    if kind == "fsdp2":
        from clm_dist.engine.fsdp import Fsdp

        return Fsdp(accelerator, model, optimizer, max_norm)
    from clm_dist.engine.replicated import Replicated

    return Replicated(accelerator, model, optimizer, max_norm)
