"""The loss of a linear layer's outputs, and its gradients, for some tokens at a time: (N, V) numbers are never whole.

They are the largest thing in a small model's training: 1.6 GB in fp32 for 8 x 1,024 tokens of GPT-2's 50,257, and their
gradient as much again. A chunk's loss and gradient are made together, while its logits are there (the idea of fused linear
cross-entropy: Wijmans et al., arXiv:2411.09009; Hsu et al., arXiv:2410.10989), and the next chunk takes its place.

Legend: N tokens, d width, V vocabulary, n tokens of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from clm_dist.model.compiled import can_compile
from clm_dist.model.kernels import IGNORED, Gradients, Layer, Learner, at_once, by_formula, in_slices

# Logits of a chunk. On a CPU twice as many gain nothing, and with fewer matrix products lose their speed.
ELEMENTS_ON_CPU, ELEMENTS_ON_GPU = 2**24, 2**27
ALIGNMENT = 64  # rows; with GPT-2's 50,257 as they are an H100 multiplies 4.5 times as slowly (docs/performance.md)


@dataclass(frozen=True)
class Output:
    """What makes logits of hidden states: scale * (hidden @ weight.T + bias), or cap * tanh of the sum / cap."""

    weight: torch.Tensor  # (V, d)
    bias: torch.Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None


def summed_nll(hidden: torch.Tensor, output: Output, targets: torch.Tensor) -> torch.Tensor:
    """Summed nats of the targets, (), fp32, with gradients to hidden, weight and bias.

    hidden: (N, d). targets: (N,) int64, IGNORED where none counts. Under autocast products are in its type, sums in fp32.
    """
    total: torch.Tensor = _SummedNll.apply(hidden, output.weight, output.bias, targets, output.scale, output.cap)
    return total


@torch.no_grad()
def each_nll(hidden: torch.Tensor, output: Output, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each target, (N,) fp32, 0 where it is IGNORED; and whether it was the likeliest, (N,) bool. No gradients."""
    matrix, added = _matrix(output.weight, output.bias, hidden)
    nll = torch.empty(len(hidden), device=hidden.device)
    correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows in _chunks(len(hidden), len(matrix), hidden.device):
        logits = _logits(hidden[rows], matrix, added)[:, : len(output.weight)]
        logits = _mapped(logits.float(), output.scale, output.cap)
        nll[rows] = F.cross_entropy(logits, targets[rows], ignore_index=IGNORED, reduction="none")
        correct[rows] = logits.argmax(-1) == targets[rows]
    return nll, correct


class _SummedNll(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies them by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        cap: float | None,
    ) -> torch.Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        matrix, added = _matrix(weight, bias, hidden)
        layer = Layer(matrix, added, scale, cap, len(weight))
        learn = _learner(hidden.device.type)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if of_hidden else None
        d_matrix = torch.zeros(matrix.shape, dtype=torch.float32, device=hidden.device) if of_weight else None
        d_bias = torch.zeros(len(weight), dtype=torch.float32, device=hidden.device) if of_bias else None
        for rows in _chunks(len(hidden), len(matrix), hidden.device):
            gradients = Gradients(None if d_hidden is None else d_hidden[rows], d_matrix, d_bias)
            total += learn(hidden[rows].to(matrix.dtype), targets[rows], layer, gradients).double().sum()
        if d_matrix is not None:  # no view: autograd then adds to it in place what a tied embedding's gradient is
            d_matrix.resize_(weight.shape)
        ctx.save_for_backward(d_hidden, d_matrix, d_bias)
        ctx.types = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[Any, ...]:
        found = (
            None if gradient is None else gradient.mul_(above).to(kind)
            for gradient, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return (*found, None, None, None)


def _matrix(
    weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias as they are multiplied: in autocast's type, on a GPU with as many rows as it multiplies fast."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    rows = -(-len(weight) // ALIGNMENT) * ALIGNMENT if kind != "cpu" else len(weight)
    if rows == len(weight):
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    longer = weight.new_zeros((rows, weight.shape[1]), dtype=dtype)
    longer[: len(weight)] = weight
    return longer, None if bias is None else F.pad(bias.to(dtype), (0, rows - len(bias)))


def _chunks(tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Rows of the chunks, about equal: a small one at the end would be slow."""
    most = max(1, (ELEMENTS_ON_CPU if device.type == "cpu" else ELEMENTS_ON_GPU) // vocabulary)
    size = -(-tokens // max(1, -(-tokens // most)))
    size = min(most, -(-size // 8) * 8) or 1
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _logits(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(n, V)"""
    return F.linear(x.to(matrix.dtype), matrix, bias)


def _mapped(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    if cap is not None:
        return cap * torch.tanh(logits / cap)
    return logits if scale == 1 else logits * scale


@cache
def _learner(device: str) -> Learner:
    if device == "cpu":
        return in_slices
    return at_once(torch.compile(by_formula) if can_compile() else by_formula)
