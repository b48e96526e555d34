"""What one rank sends in a step. Pure arithmetic.

A ring sums W tensors of n bytes, or gathers their parts, by sending n (W - 1) / W bytes from every rank; an all-reduce is
both (Patarasuk & Yuan, J. Parallel Distrib. Comput. 69, 2009). ZeRO (arXiv:1910.02054, section 7) has stages 1 and 2 send
as much as DDP and stage 3 half as much again. The live engines send more (tests/distributed/test_plan_live.py counts it):
gradients travel in fp32 at every precision, and DeepSpeed's stages 1 and 2 sum them by all-reduces, of which each rank then
keeps its part.

Gradient accumulation: DDP, stage 1 and FSDP2 exchange gradients once a step, stages 2 and 3 in every micro-step; stage 3
and FSDP2 gather parameters for the forward and for the backward pass of every micro-step. Their gathering is an upper
bound: small tensors, and those that FSDP2 has in no layer, stay whole for a while.
"""

from clm_dist.planning.memory import FP32, Strategy
from clm_dist.planning.shapes import Shapes


def bytes_sent(shapes: Shapes, strategy: Strategy, world_size: int, mixed: bool, micro_steps: int) -> int:
    """Bytes that one rank sends in one step of so many micro-steps."""
    width = 2 if mixed else FP32  # of weights on their way
    gradients = FP32 * shapes.trained
    if strategy.stage == 0:
        total = 2 * gradients
    elif strategy.stage < 3:
        exchanges = micro_steps if strategy.stage == 2 else 1
        total = 2 * gradients * exchanges + width * shapes.trained
    else:
        exchanges = 1 if strategy.by_torch else micro_steps
        total = gradients * exchanges + 2 * width * shapes.parameters * micro_steps
    return total * (world_size - 1) // world_size
