"""torch.compile where it pays: the blocks of a model while it trains, one graph for all of them.

Blocks, not the model: their graph is compiled once for all layers, in seconds; the mask of attention is made outside it, so
that attention stays the fused causal kernel; and what an engine hangs on modules stays around it. A block's forward is
replaced, not the block: weights keep their names. Evaluation and text are computed as they are without, by the same code as
`clm-dist evaluate` and `generate`: their lengths vary, and each would be compiled anew.
"""

import os
import shutil
from typing import Any

import torch
from torch.utils._triton import has_triton

from clm_dist.config import TrainConfig
from clm_dist.errors import UserError
from clm_dist.model.matrix import recorded
from clm_dist.model.transformers_versions import MAJOR


def why_not(model: Any, device: str, kind: str) -> str | None:
    """Why a model's blocks are not compiled by default; None where they are. kind: of engine."""
    if device != "cuda":
        return "no GPU, and a CPU compiles for minutes"
    if kind == "zero":
        return "DeepSpeed's hooks stand within the blocks"
    if not can_compile():
        return "it needs Triton and a C compiler (cc, gcc, clang), which are not here"
    cell = recorded(MAJOR)["rows"].get(model.config.model_type, {}).get("compile", "yes")
    if not cell.startswith("yes"):
        return f"{model.config.model_type}: {cell.removeprefix('no: ')}"
    if not _blocks(model):
        return f"{type(model).__name__} does not say which its blocks are"
    return None


def compile_if_asked(train: TrainConfig, model: Any, device: str, kind: str) -> str | None:
    """Compiles where the recipe wants it; what to say of that. UserError where it cannot."""
    if train.compile == "off":
        return None
    why = why_not(model, device, kind)
    if why is None and train.activation_checkpointing == "selective":  # `on` with it is refused with the recipe
        why = "train.activation_checkpointing=selective tells a block's operations apart, compiled they are one"
    if train.compile == "auto" and why is not None:
        return None if device != "cuda" else f"train.compile=auto is off: {why}"
    if train.compile == "auto":
        torch._dynamo.config.suppress_errors = True  # what the compiler cannot do after all is computed without it
    if not _blocks(model):
        raise UserError(
            f"train.compile=on compiles a model's blocks, and {type(model).__name__} does not say which they are; set "
            "train.compile=auto"
        )
    return f"{compile_blocks(model, train.deterministic)} blocks are compiled: the first step takes longer"


def can_compile() -> bool:
    """Whether kernels for a GPU can be compiled here."""
    compiler = os.environ.get("CC")
    return has_triton() and any(map(shutil.which, filter(None, (compiler, "cc", "gcc", "clang"))))


def compile_blocks(model: Any, deterministic: bool) -> int:
    """Compiles each block's forward for training; returns how many there are. In place.

    deterministic: kernels are not chosen by timing them, which another start might decide otherwise.
    """
    inductor = torch._inductor.config
    if deterministic and hasattr(inductor, "deterministic"):  # torch 2.9
        inductor.deterministic = True
    blocks = _blocks(model)
    for block in blocks:
        _compile(block)
    return len(blocks)


def _compile(block: torch.nn.Module) -> None:
    plain = block.forward
    fast = torch.compile(plain, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fast(*args, **kwargs) if block.training else plain(*args, **kwargs)

    block.forward = forward


def _blocks(model: Any) -> list[torch.nn.Module]:
    """The modules that transformers names as such; a block within a block goes with it."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ in names and id(module) not in inside:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    return found
