"""How long it takes, from the floating-point operations of a step and a speed that was measured or stated. Pure.

A parameter multiplies each token once in the forward pass and twice in the backward pass, 2 operations each: 6 N. Attention
adds 12 L W T (L layers of width W, T tokens of context); both as in PaLM (arXiv:2204.02311, appendix B). Activation
checkpointing does the forward pass a second time: 8 N and 16 L W T; not if it is selective, and keeps what multiplies.
"""

from clm_dist.fields import Checkpointing
from clm_dist.planning.shapes import Shapes

# Stated, to compare ways to lay out one model, not to promise a time: about half of what the data sheet of an A100 says.
TFLOPS = 150.0  # 10^12 operations a second of a GPU, where --tflops says nothing
MEMORY = 1e12  # bytes a second that a GPU reads of its own memory
LINK = 150e9  # bytes a second that a GPU sends within a node (NVLink)
NETWORK = 12.5e9  # and between nodes: 100 Gbit/s


def flops_per_token(shapes: Shapes, block_size: int, checkpointing: Checkpointing) -> int:
    """Operations for one trained token; an embedding that is only looked up does not multiply."""
    passes = 4 if checkpointing is True else 3
    trained = shapes.trained - (0 if shapes.lookup_frozen else shapes.lookup)
    frozen = sum(shapes.frozen) - (shapes.lookup if shapes.lookup_frozen else 0)
    # what is frozen has no gradient of its own, and hands on that of its input
    return passes * (2 * trained + 4 * shapes.layers * shapes.width * block_size) + (passes - 1) * 2 * frozen


def seconds_per_step(flops: int, tokens_per_step: int, gpus: int, tflops: float) -> float:
    """Seconds of a step at so many TFLOP/s that every GPU really does; communication that it hides costs nothing."""
    return flops * tokens_per_step / (gpus * tflops * 1e12)


def cost_seconds(
    flops: int, weights: int, micro_steps: int, sent: int, nodes: int, tflops: float | None = None
) -> float:
    """Seconds of a step by stated speeds: computing, which in small micro-steps is waiting for weights, then sending.

    flops: of one micro-step of a GPU. weights: bytes, read in each of forward, gradient of the input and of the weights.
    Sending is not hidden behind computing here, which is the worst case: the more is sent, the less of it can hide.
    """
    computing = max(flops / ((tflops or TFLOPS) * 1e12), 3 * weights / MEMORY)
    return micro_steps * computing + sent / (LINK if nodes == 1 else NETWORK)
