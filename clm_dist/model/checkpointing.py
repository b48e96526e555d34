"""Activations that a backward pass computes again instead of keeping them (Chen et al., arXiv:1604.06174).

Of each block its input alone is kept, or, selective, what matrix products and fused attention give as well: what lies
between them (norms, activation functions, rotations, masks of dropout) is most of the memory and little of the work.
(Korthikanti et al., arXiv:2205.05198, section 5, select the other way round, for attention that keeps T x T numbers.)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from clm_dist.errors import UserError
from clm_dist.fields import Checkpointing
from clm_dist.model import transformers_versions
from clm_dist.model.configuration import row_of

ATEN = torch.ops.aten
# bmm and baddbmm are left out: an unfused attention (a model without SDPA, or dropout in it on a CPU) makes T x T numbers
# with them, and computes these again; so is _grouped_mm, of experts, whose results some models change in place (GPT-OSS)
KEPT = [
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_activations(
    model: Any, how: Checkpointing = True, again: Callable[[], AbstractContextManager[Any]] | None = None
) -> None:
    """Has the blocks of `model` compute their activations again; UserError where it cannot.

    how: as `train.activation_checkpointing`; False does nothing. again: what the second computation runs in.
    """
    if not how:
        return
    row = row_of(model.config)
    has = transformers_versions.MAJOR in row.checkpointing if row else True  # one takes the wish and does nothing
    if not has or not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} cannot compute activations again; set train.activation_checkpointing=false"
        )
    # the re-entrant kind loses DDP's hooks where a block is used twice
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective" or again is not None:
        options["context_fn"] = lambda: _contexts(how, again or nullcontext)
    # its name since transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def _contexts(
    how: Checkpointing, again: Callable[[], AbstractContextManager[Any]]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a block's first computation runs in, and its second."""
    if how != "selective":
        return nullcontext(), again()
    keeping, having = create_selective_checkpoint_contexts(KEPT)
    return keeping, _both(having, again())


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield
