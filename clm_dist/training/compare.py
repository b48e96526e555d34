"""Whether all ranks still hold the same: a check sum of every tensor, the learning rate and the data position."""

import struct

import torch
from accelerate import Accelerator

from clm_dist.errors import RunError


def compare_ranks(accelerator: Accelerator, held: dict[str, torch.Tensor], lr: float, cursor: int) -> None:
    """RunError, on all ranks, naming the first thing that differs. Every rank must call this; a sync.

    held: what every rank should hold alike.
    """
    if accelerator.num_processes == 1:
        return
    sums = [check_sum(tensor) for tensor in held.values()]
    (lr_bits,) = struct.unpack("<q", struct.pack("<d", lr))
    numbers = torch.tensor([lr_bits, cursor], dtype=torch.int64, device=accelerator.device)
    table = accelerator.gather(torch.cat([*(one[None] for one in sums), numbers])[None])  # (world_size, things); sync
    different = (table != table[0]).any(0).nonzero().flatten().tolist()
    if different:
        names = [*held, "the learning rate", "the data position"]
        first = different[0]
        values, counts = table[:, first].unique(return_counts=True)
        odd = (table[:, first] != values[counts.argmax()]).nonzero().flatten().tolist()
        raise RunError(
            f"the ranks hold different weights: {names[first]} differs first (rank {', '.join(map(str, odd))} against the "
            f"others), {len(different)} of {len(names)} things in all; resume from a checkpoint before this step, and check "
            "memory and device of that rank"
        )


def check_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over the bits of a tensor, modulo 2**64, () int64: cheap, equal for equal bits, other for any one changed."""
    bits = tensor.detach().contiguous().view(-1)
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[bits.element_size()]
    return bits.view(width).sum(dtype=torch.int64)
