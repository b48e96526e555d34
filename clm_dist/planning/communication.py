"""What one rank sends in a step. Pure arithmetic.

A ring sums W tensors of n bytes, or gathers their parts, by sending n (W - 1) / W bytes from every rank; an all-reduce is
both (Patarasuk & Yuan, J. Parallel Distrib. Comput. 69, 2009). ZeRO (arXiv:1910.02054, section 7): stages 1 and 2 send as
much as DDP, since they sum gradients to where they are needed and gather updated parameters; stage 3 gathers the
parameters for the forward pass and again for the backward pass, half as much again.

Gradient accumulation changes that: DDP and stage 1 exchange gradients once a step, stage 2 sums them into the ranks' parts
in every micro-step, stage 3 gathers parameters in every micro-step too.
"""

from clm_dist.planning.memory import FP32, Strategy
from clm_dist.planning.shapes import Shapes


def bytes_sent(shapes: Shapes, strategy: Strategy, world_size: int, mixed: bool, micro_steps: int) -> int:
    """Bytes that one rank sends in one step of so many micro-steps."""
    width = 2 if mixed else FP32  # of DeepSpeed's weights and gradients on their way; DDP's are fp32
    once = {
        0: 2 * FP32 * shapes.trained,
        1: 2 * width * shapes.trained,
        2: width * shapes.trained * (micro_steps + 1),
        3: width * micro_steps * (2 * shapes.parameters + shapes.trained),
    }[strategy.stage]
    return once * (world_size - 1) // world_size
