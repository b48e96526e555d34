"""GELU by tanh (Hendrycks and Gimpel, arXiv:1606.08415, section 2) as one operation.

transformers writes it out for GPT-2 and others: eight operations over the widest tensors of a block, for which autograd
keeps four of them, three in fp32 under autocast on a GPU. torch has the same formula as a kernel that keeps one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), the root with 8 digits at least. "gelu_python_tanh" is left out:
# it shares its class with the kernel, and no configuration has it by default.
WRITTEN_OUT = frozenset({"AccurateGELUActivation", "BloomGelu", "FastGELUActivation", "NewGELUActivation"})


class FusedGELU(torch.nn.Module):
    """The kernel where a model learns; in evaluation the library's own operations, to the last bit."""

    def __init__(self, written: torch.nn.Module):
        super().__init__()
        # no submodule: ZeRO-3 fetches weights in the order in which modules were called, and an evaluation would change it
        self.written: Callable[[torch.Tensor], torch.Tensor] = written.forward
        self.train(written.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """GELU of each element."""
        return F.gelu(x, approximate="tanh") if self.training else self.written(x)


def fuse_gelu(model: torch.nn.Module) -> None:
    """Wraps transformers' modules that write it out; names of weights and the configuration stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in WRITTEN_OUT and type(child).__module__.startswith("transformers."):
                setattr(parent, name, FusedGELU(child))
