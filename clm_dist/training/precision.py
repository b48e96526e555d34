"""What `train.mixed_precision: auto` means here, and whether this machine can do what was asked for."""

import importlib.util

import torch

from clm_dist.config import Config
from clm_dist.errors import UserError


def settle_precision(config: Config) -> tuple[Config, str | None]:
    """The recipe with a precision in the place of auto, and what to say about it."""
    if config.train.mixed_precision != "auto":
        return config, None
    precision, why = _chosen()
    train = config.train.model_copy(update={"mixed_precision": precision})
    return config.model_copy(update={"train": train}), f"train.mixed_precision=auto is {precision}: {why}"


def check_precision(precision: str) -> None:
    """Refuses what this machine cannot do."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.mixed_precision=fp16 needs a GPU; set train.mixed_precision=bf16 or no")
    if precision == "fp8":
        problem = _fp8_problem()
        if problem:
            raise UserError(f"train.mixed_precision=fp8 (experimental) {problem}; set train.mixed_precision=bf16")


def _chosen() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "no", "no GPU here, and fp32 is exact"
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"{name} computes in it, with the range of fp32: no loss scaling"
    return "no", f"{name} has no bf16; fp16, with loss scaling, is there when asked for"


def _fp8_problem() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU of compute capability 8.9 or higher, and there is none"
    if torch.cuda.get_device_capability() < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"needs a GPU of compute capability 8.9 or higher, {torch.cuda.get_device_name()} has {capability}"
    if not any(importlib.util.find_spec(name) for name in ("torchao", "transformer_engine")):
        return "needs torchao or transformer_engine, and neither is installed (pip install torchao)"
    return None
