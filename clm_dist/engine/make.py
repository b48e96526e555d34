"""The engine that a launch asked for."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from clm_dist.engine.engine import Engine
from clm_dist.engine.replicated import Replicated
from clm_dist.engine.zero import Zero


def make_engine(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
) -> Engine:
    """Gives the model to whatever the processes were started for. max_norm: to clip at. Every rank must call this."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return Zero(accelerator, model, optimizer)
    return Replicated(accelerator, model, optimizer, max_norm)
