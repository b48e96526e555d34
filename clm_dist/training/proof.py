"""What is proved of a model before its first step, on itself: that it sees no later token, and no other document."""

from typing import Any

import torch

from clm_dist.config import Config
from clm_dist.model.causality import check_causality
from clm_dist.model.isolation import check_isolation
from clm_dist.model.loss import next_token_nll


def prove(config: Config, model: Any, name: str, device: torch.device, stays: bool = True) -> None:
    """UserError where a promise does not hold. On every rank alike, so that all of them leave.

    Computes in fp32 on the device where a model fits there. stays: whether that is its place; else it goes back.
    """
    if not (config.model.check_causality or config.train.isolate_documents):
        return
    fits = stays or device.type == "cpu" or torch.cuda.mem_get_info(device)[0] > 2 * _nbytes(model)
    model.to(device if fits else "cpu")
    if config.model.check_causality:
        check_causality(model, config.data.block_size, name, next_token_nll)
    if config.train.isolate_documents:
        check_isolation(model, config.data.block_size, name)
    if not stays:
        model.to("cpu")


def _nbytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
