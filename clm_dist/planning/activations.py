"""The memory that a forward and backward pass takes beside the model: counted on tensors without contents.

One micro-step of the real model and of our loss runs under torch's FakeTensorMode, which follows shapes, types and
lifetimes and computes nothing. Every storage is counted from its making to its end, so the peak is that of the live
tensors, for any architecture, attention implementation and precision. The closed formula of Korthikanti et al.
(arXiv:2205.05198, eq. 2) stands in where a model does something that needs values.

Three things differ between the CPU and a GPU, and are counted as on a GPU: attention is one fused kernel also with dropout
(on the CPU dropout would bring back the T x T matrix), a dropout mask is one byte an element, and autocast has more
operations that it computes in fp32 (FP32_ON_GPU; a power, say, where an activation function is written out).
And of the chunks in which the loss is computed one is counted, as large as a GPU has them, and so as if there were many.

Legend: B sequences, T = block_size, V = vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from clm_dist.fields import Checkpointing
from clm_dist.model import chunks
from clm_dist.model.checkpointing import checkpoint_activations
from clm_dist.model.head import Head, UnknownHeadError
from clm_dist.model.kernels import at_once
from clm_dist.model.objective import Objective
from clm_dist.model.transformers_versions import without_looking_at_values
from clm_dist.planning.memory import Activations, Envelope, Line
from clm_dist.planning.shapes import Shapes

# What autocast computes in fp32 on CUDA (torch.amp's op reference) and might leave in 16 bits on the CPU.
FP32_ON_GPU = {
    *("__pow__", "__rpow__", "__rdiv__", "__rtruediv__", "acos", "asin", "cosh", "cumprod", "cumsum", "dist", "erfinv"),
    *("exp", "expm1", "group_norm", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "norm"),
    *("pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "softmax", "softmin", "softplus", "sum", "tan"),
}


@dataclass(frozen=True)
class MicroStep:
    """What one micro-step came to, in bytes."""

    kept: int  # when the forward pass is done
    alive: tuple[int, ...]  # each time that something new was made

    @property
    def peak(self) -> int:
        """The most that was alive at once."""
        return max(self.alive)


def count(
    build: Callable[[torch.dtype], Any],
    block_size: int,
    precision: str,
    checkpointing: Checkpointing,
    chunked: bool = True,
) -> Activations:
    """Activations of the model that `build` makes in a given type, under FakeTensorMode.

    precision: "fp32"; "autocast" (bf16 or fp16 computation on fp32 weights, as DDP trains); "bf16" (weights too, as
    DeepSpeed does). checkpointing: as `train.activation_checkpointing`; UserError where the architecture has none. chunked:
    as `train.chunked_loss`.
    """
    # a single sequence is left out, since its transposed tensors need no copies; and of fewer the loss is in one chunk
    few = max(2, -(-chunk_rows(build) // block_size))
    one, more = (simulate(build, b, block_size, precision, checkpointing, chunked=chunked) for b in (few, few + 1))
    # the same operations in the same order whatever B is: each moment is a line of its own, and so the worst is known
    # for every B, although it is another one for few sequences (a gradient of an embedding) than for many (the layers)
    moments = (_line(few, *pair) for pair in zip(one.alive, more.alive, strict=True))
    return Activations(_line(few, one.kept, more.kept), Envelope.over(moments), counted=True)


def has_head(model: Any) -> bool:
    """Whether the loss of a model is computed by chunks: without contents nothing can be proved, and so by kind."""
    try:
        Head(model).detach()
    except UnknownHeadError:
        return False
    return True


def chunk_rows(build: Callable[[torch.dtype], Any]) -> int:
    """Tokens of a full chunk of the loss on a GPU."""
    with FakeTensorMode():
        vocabulary = build(torch.float32).config.get_text_config().vocab_size
    return max(1, chunks.ELEMENTS_ON_GPU // vocabulary)


def formula(
    shapes: Shapes, vocab_size: int, block_size: int, precision: str, checkpointing: Checkpointing
) -> Activations:
    """The closed form for a GPT with dropout: a layer keeps 34 bytes of each of T x h activations in 16 bits (eq. 2 of
    arXiv:2205.05198 without its T x T terms, which a fused attention kernel does not keep), or only its input (selective:
    and ten times as much, of four products and attention)."""
    width = 4 if precision == "fp32" else 2
    layer = 17 * width * block_size * shapes.width
    again = (11 if checkpointing == "selective" else 1) * width * block_size * shapes.width
    kept = shapes.layers * (again if checkpointing else layer)
    # a chunk's logits and their gradient, and the gradients that they make: of the head's weights, in fp32, and of its input
    head = 4 * vocab_size * shapes.width
    loss = Line(2 * width * chunks.ELEMENTS_ON_GPU + head, width * block_size * shapes.width)
    weights = 2 * shapes.parameters if precision == "autocast" else 0
    moments = [Line(weights + loss.fixed, kept + loss.per_sequence)]
    if checkpointing:
        moments.append(Line(weights, kept + layer))
    return Activations(Line(weights, kept), Envelope.over(moments), counted=False)


def simulate(
    build: Callable[[torch.dtype], Any],
    sequences: int,
    block_size: int,
    precision: str,
    checkpointing: Checkpointing = False,
    as_on_gpu: bool = True,
    chunked: bool = True,
) -> MicroStep:
    """One micro-step of B sequences without contents."""
    with FakeTensorMode():
        model = build(torch.bfloat16 if precision == "bf16" else torch.float32).train()
        # a backward pass suspends the mode that it is called under, and what it computes again must be what it was
        checkpoint_activations(model, checkpointing, GpuAutocast if as_on_gpu else None)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # gradients are counted elsewhere; these are added to
        ids = torch.zeros(sequences, block_size, dtype=torch.int64)
        meter = Meter()
        with without_looking_at_values(), _as_on_gpu() if as_on_gpu else nullcontext(), meter, one_chunk():
            return micro_step(model, ids, precision, meter, chunked)


def micro_step(model: Any, ids: torch.Tensor, precision: str, meter: "Meter", chunked: bool = True) -> MicroStep:
    """Forward, loss and backward, as training does them."""
    mixed = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "autocast" else nullcontext()
    kept: list[int] = []
    layer = model.get_output_embeddings()
    if isinstance(layer, torch.nn.Module):
        layer.register_forward_pre_hook(lambda *_: kept.append(meter.alive))
    objective = Objective(Head(model)) if chunked and has_head(model) else Objective()
    model.config.use_cache = False
    with mixed:
        nll = objective.summed(model, {"input_ids": ids})
    nll.backward()
    return MicroStep(kept[0] if kept else meter.alive, tuple(meter.history))


def gpu_kernel(logits: torch.Tensor, targets: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a GPU's kernel of the loss makes, without the numbers."""
    return torch.zeros_like(targets, dtype=torch.float32), torch.empty_like(logits)


@contextmanager
def one_chunk() -> Iterator[None]:
    """The loss of as many tokens as a GPU takes at a time, by as many tensors as it takes for them."""

    def first(tokens: int, vocabulary: int, _: Any) -> Iterator[slice]:
        yield slice(0, min(tokens, max(1, chunks.ELEMENTS_ON_GPU // vocabulary)))

    with patch.object(chunks, "_chunks", first), patch.object(chunks, "_learner", lambda _: at_once(gpu_kernel)):
        yield


class Meter(TorchDispatchMode):
    """Bytes of the storages made under it that are alive, now and each time that there was a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.history: list[int] = []
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what storages are new in its results."""
        out = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._count(storage)
        return out

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.alive -= size

        self._known[key] = weakref.ref(storage, forget)
        self.alive += size
        self.history.append(self.alive)


class GpuAutocast(TorchFunctionMode):
    """The CPU's autocast with the list of a GPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises what is in 16 bits to fp32 first, where a GPU would."""
        if getattr(func, "__name__", "") in FP32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, _raised, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _raised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Autocast as on a GPU, and dropout as its kernels do it: within attention nothing is kept of it, elsewhere a mask of
    one byte an element."""
    attention = F.scaled_dot_product_attention

    def without_dropout(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs)

    with (
        patch("torch.nn.functional.scaled_dot_product_attention", without_dropout),
        patch("torch.nn.functional.dropout", _dropout),
        GpuAutocast(),
    ):
        yield


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: A002
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _line(sequences: int, one: int, more: int) -> Line:
    """Through the bytes of so many sequences, and of one more."""
    return Line(one - (more - one) * sequences, more - one)
