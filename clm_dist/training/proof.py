"""What is proved of a model before its first step, on itself: that it sees no later token, and no other document."""

from typing import Any

import torch

from clm_dist.config import Config
from clm_dist.model.causality import check_causality
from clm_dist.model.isolation import check_isolation
from clm_dist.model.lora import adapters, check_reached
from clm_dist.model.loss import next_token_nll
from clm_dist.model.objective import Objective, find_objective


def prove(config: Config, model: Any, name: str, device: torch.device, stays: bool = True) -> Objective:
    """How the model's loss is computed, proved too; UserError where a promise does not hold. On every rank alike, so that
    all of them leave.

    A model with adapters is proved with them: what is proved is what is trained, and that each adapter is on its way.
    Computes in fp32 on the device where a model fits there. stays: whether that is its place; else it goes back.
    """
    fits = stays or device.type == "cpu" or torch.cuda.mem_get_info(device)[0] > 2 * _nbytes(model)
    model.to(device if fits else "cpu")
    if config.model.check_causality:
        check_causality(model, config.data.block_size, name, next_token_nll)
    if config.train.isolate_documents:
        check_isolation(model, config.data.block_size, name)
    if adapters(model):
        check_reached(model, config.data.block_size)
    objective = find_objective(model, config.train.chunked_loss)
    if not stays:
        model.to("cpu")
    return objective


def _nbytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
