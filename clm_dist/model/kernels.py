"""Nats and gradients of a chunk of tokens, from its logits while they are there: how a CPU makes them, and how a GPU.

Legend: d width, V vocabulary, V' rows that are multiplied (V and zeros), n tokens of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

IGNORED = -100  # cross_entropy's own default for a target that does not count
# Words of a slice: its logits stay in a core's cache, and are too small for a mapping of their own, made anew each time
WIDTH = 1024


@dataclass(frozen=True)
class Layer:
    """What makes logits of x, as it is multiplied: scale * (x @ matrix.T + bias), or cap * tanh of the sum / cap."""

    matrix: torch.Tensor  # (V', d)
    bias: torch.Tensor | None  # (V',)
    scale: float
    cap: float | None
    vocabulary: int  # V


@dataclass(frozen=True)
class Gradients:
    """What is added to; None where nobody wants it."""

    hidden: torch.Tensor | None  # (n, d) of the chunk, zeros
    matrix: torch.Tensor | None  # (V', d) fp32, summed over the chunks
    bias: torch.Tensor | None  # (V,) fp32, the same

    def add(self, d_logits: torch.Tensor, words: slice, x: torch.Tensor, layer: Layer) -> None:
        """What some words' part of d_logits, (n, their number), makes. x: (n, d) that the logits are of."""
        if self.hidden is not None:
            self.hidden.add_(d_logits @ layer.matrix[words])
        if self.matrix is not None:
            add_product(self.matrix[words], d_logits, x)
        if self.bias is not None:
            self.bias[words] += d_logits[:, : layer.vocabulary].float().sum(0)


# x (n, d), targets (n,), the layer, what to add to -> nats (n,)
Learner = Callable[[torch.Tensor, torch.Tensor, Layer, Gradients], torch.Tensor]
# logits (n, V'), targets (n,), scale, cap, V -> nats (n,), their gradients by the logits (n, V')
Kernel = Callable[[torch.Tensor, torch.Tensor, float, float | None, int], tuple[torch.Tensor, torch.Tensor]]


def add_product(total: torch.Tensor, d_logits: torch.Tensor, x: torch.Tensor) -> None:
    """total += d_logits.T @ x, in fp32 over the chunks."""
    if d_logits.dtype == torch.float32:
        total.addmm_(d_logits.T, x)
    elif d_logits.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8: rounded at the end alone
        torch.ops.aten.addmm.dtype_out(total, d_logits.T, x, torch.float32, out=total)
    else:
        total += d_logits.T @ x


def at_once(kernel: Kernel) -> Learner:
    """All words of a chunk in one piece: on a GPU."""

    def learn(x: torch.Tensor, targets: torch.Tensor, layer: Layer, gradients: Gradients) -> torch.Tensor:
        # without a name for the logits, which are gone when their gradients are multiplied
        nll, d_logits = kernel(F.linear(x, layer.matrix, layer.bias), targets, layer.scale, layer.cap, layer.vocabulary)
        gradients.add(d_logits, slice(0, len(layer.matrix)), x, layer)
        return nll

    return learn


def in_slices(x: torch.Tensor, targets: torch.Tensor, layer: Layer, gradients: Gradients) -> torch.Tensor:
    """Some words after the other: on a CPU, where every pass over a chunk that has left the cache counts.

    Twice over the words: a slice's logits become its own softmax, and once the sum over all slices is known, gradients.
    """
    counts = targets != IGNORED
    targets = torch.where(counts, targets, 0)
    given = torch.zeros(len(x))
    slices = _slices(layer.matrix)
    parts, slopes, largest, peaks = [], [], [], []
    for words in slices:
        bias = None if layer.bias is None else layer.bias[words]
        z = F.linear(x, layer.matrix[words], bias).float()
        if layer.cap is not None:
            z.div_(layer.cap).tanh_()
            slopes.append(1 - z.square())
            z.mul_(layer.cap)
        elif layer.scale != 1:
            z.mul_(layer.scale)
        rows, columns = _hits(targets, words)
        given[rows] = z[rows, columns]
        largest.append(z.amax(-1))
        parts.append(torch.softmax(z, -1, out=z))
        peaks.append(z.amax(-1))
    # a slice's sum of exponentials is one by its largest probability, whose own exponential is exactly one
    top = torch.stack(largest).amax(0)
    sums = (torch.stack(largest) - top).exp() / torch.stack(peaks)
    total = sums.sum(0)
    shares = torch.where(counts, sums / total, 0.0)
    summed = replace(gradients, hidden=None if gradients.hidden is None else gradients.hidden.float())
    for place, words in enumerate(slices):
        p = parts[place].mul_(shares[place][:, None])
        rows, columns = _hits(torch.where(counts, targets, -1), words)
        p[rows, columns] -= 1
        if layer.cap is not None:
            p.mul_(slopes[place])
        elif layer.scale != 1:
            p.mul_(layer.scale)
        summed.add(p.to(layer.matrix.dtype), words, x, layer)
    if gradients.hidden is not None and summed.hidden is not None:
        gradients.hidden.copy_(summed.hidden)  # itself in fp32; in 16 bits rounded once and not with each slice
    # by the largest logit, for a target's own probability may be 0
    return torch.where(counts, top - given + total.log(), 0.0)


def _slices(matrix: torch.Tensor) -> list[slice]:
    return [slice(start, min(start + WIDTH, len(matrix))) for start in range(0, len(matrix), WIDTH)]


def _hits(targets: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target is one of these words, and where in the slice it is."""
    rows = ((targets >= words.start) & (targets < words.stop)).nonzero()[:, 0]
    return rows, targets[rows] - words.start


def by_formula(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, cap: float | None, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the compiler, which makes two passes of it."""
    z = logits.float()
    columns = torch.arange(logits.shape[-1], device=logits.device)
    slope: torch.Tensor | float = scale
    if cap is not None:
        bent = torch.tanh(z / cap)
        z, slope = cap * bent, 1 - bent * bent
    else:
        z = z * scale
    z = torch.where(columns < vocabulary, z, float("-inf"))
    counts = targets != IGNORED
    targets = torch.where(counts, targets, 0)
    lse = z.logsumexp(-1)
    nll = torch.where(counts, lse - z.gather(1, targets[:, None])[:, 0], 0.0)
    hit = columns == targets[:, None]
    gradient = ((z - lse[:, None]).exp() - hit.to(z.dtype)) * slope
    return nll, torch.where(counts[:, None], gradient, 0.0).to(logits.dtype)
