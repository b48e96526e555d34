"""How long it takes, from the floating-point operations of a step and a speed that was measured or stated. Pure.

A parameter multiplies each token once in the forward pass and twice in the backward pass, 2 operations each: 6 N. Attention
adds 12 L W T (L layers of width W, T tokens of context); both as in PaLM (arXiv:2204.02311, appendix B). Activation
checkpointing does the forward pass a second time: 8 N and 16 L W T.
"""

from clm_dist.planning.shapes import Shapes


def flops_per_token(shapes: Shapes, block_size: int, checkpointing: bool) -> int:
    """Operations for one trained token; an embedding that is only looked up does not multiply."""
    passes = 4 if checkpointing else 3
    multiplied = shapes.parameters - shapes.lookup
    return passes * (2 * multiplied + 4 * shapes.layers * shapes.width * block_size)


def seconds_per_step(flops: int, tokens_per_step: int, gpus: int, tflops: float) -> float:
    """Seconds of a step at so many TFLOP/s that every GPU really does; communication that it hides costs nothing."""
    return flops * tokens_per_step / (gpus * tflops * 1e12)
