"""Which way to lay a model over GPUs fits, with which micro-batch, and which one to take. Pure arithmetic.

Legend: B = micro_batch_size, sequences per GPU and forward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from clm_dist.planning.communication import bytes_sent
from clm_dist.planning.estimate import flops_per_token, seconds_per_step
from clm_dist.planning.memory import (
    STRATEGIES,
    Activations,
    ModelState,
    Strategy,
    ZeroSettings,
    buffers,
    by_paper,
    model_state,
)
from clm_dist.planning.shapes import Shapes

GIB = 2**30
# What a process has on the GPU before its first tensor: the CUDA context, kernels, NCCL's channels, cuBLAS workspaces.
CONTEXT_BYTES = 1 * GIB
# Of the rest, what the caching allocator cannot give out: it rounds sizes up and keeps blocks that nothing fits into.
FRAGMENTATION = 0.06
MOST = 4096  # sequences; a micro-batch beyond that is not looked for


@dataclass(frozen=True)
class Cluster:
    """What the run would stand on."""

    gpus: int  # in all
    gpu_memory_gib: float  # of each
    nodes: int = 1
    cpu_memory_gib: float | None = None  # of each node; None: not known
    tflops: float | None = None  # 10^12 operations a second that one GPU does on such a model, measured or stated

    @property
    def usable(self) -> int:
        """Bytes of a GPU that tensors can have."""
        return int((self.gpu_memory_gib * GIB - CONTEXT_BYTES) * (1 - FRAGMENTATION))


@dataclass(frozen=True)
class Task:
    """What is trained, and how: all that the rows share."""

    shapes: Shapes
    block_size: int
    global_batch_size: int
    mixed: bool
    cluster: Cluster
    zero: ZeroSettings = field(default_factory=ZeroSettings)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.block_size


@dataclass(frozen=True)
class Row:
    """One way to lay the model over the GPUs; bytes on the fullest one, at `micro_batch_size`."""

    strategy: str
    activation_checkpointing: bool
    fits: bool
    micro_batch_size: int  # the largest that fits and divides the global batch; 1 where none fits
    largest_micro_batch_size: int  # that fits at all; 0: none
    parameters: int
    gradients: int
    optimizer_states: int
    buffers: int
    activations: int
    logits: int  # and all else that the worst moment adds
    total: int
    by_paper: int  # of parameters, gradients and states by the ZeRO paper's 2 + 2 + 12 bytes, to compare
    host_bytes_per_node: int
    bytes_sent_per_step: int
    flops_per_token: int
    seconds_per_step: float | None


def precision_of(strategy: Strategy, mixed: bool) -> str:
    """What a strategy computes in: DDP keeps fp32 weights under autocast, DeepSpeed casts them."""
    return "fp32" if not mixed else "bf16" if strategy.stage else "autocast"


def rows(task: Task, activations: Mapping[tuple[str, bool], Activations]) -> list[Row]:
    """Every strategy without and with activation checkpointing. activations: by (precision, checkpointing)."""
    found = []
    for strategy in STRATEGIES:
        for checkpointing in (False, True):
            line = activations.get((precision_of(strategy, task.mixed), checkpointing))
            if line is not None:  # None: the model cannot be checkpointed
                found.append(_row(task, strategy, checkpointing, line))
    return found


def recommend(found: list[Row]) -> Row | None:
    """The first that fits, from what costs least: sharing, then computing layers twice, then the CPU's memory.

    Sharing of stages 1 and 2 costs next to nothing and stage 3 half again as much communication; checkpointing costs a
    third more computation; offload sends every gradient and every parameter over the PCI bus.
    """
    for offload in (False, True):
        for checkpointing in (False, True):
            for row in found:
                wanted = (row.strategy.endswith("_offload"), row.activation_checkpointing) == (offload, checkpointing)
                if wanted and row.fits:
                    return row
    return None


def largest(fits: Callable[[int], bool]) -> int:
    """The largest B for which `fits`, which holds below any B for which it holds; 0 where there is none."""
    low, high = 0, MOST + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _row(task: Task, strategy: Strategy, checkpointing: bool, line: Activations) -> Row:
    cluster = task.cluster
    state = _fullest(task, strategy)
    around = buffers(task.shapes, strategy, task.mixed, task.zero)
    held = state.parameters + state.gradients + state.optimizer_states + around
    host = state.host * cluster.gpus // cluster.nodes
    enough_host = cluster.cpu_memory_gib is None or host <= cluster.cpu_memory_gib * GIB

    def total(sequences: int) -> int:
        return held + line.peak.at(sequences)

    most = largest(lambda sequences: enough_host and total(sequences) <= cluster.usable)
    each = task.global_batch_size // cluster.gpus
    micro = max((b for b in range(1, most + 1) if each % b == 0), default=1)
    flops = flops_per_token(task.shapes, task.block_size, checkpointing)
    return Row(
        strategy=strategy.name,
        activation_checkpointing=checkpointing,
        fits=most > 0,
        micro_batch_size=micro,
        largest_micro_batch_size=most,
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer_states=state.optimizer_states,
        buffers=around,
        activations=line.kept.at(micro),
        logits=line.peak.at(micro) - line.kept.at(micro),
        total=total(micro),
        by_paper=round(by_paper(task.shapes.parameters, strategy.stage, cluster.gpus)),
        host_bytes_per_node=host,
        bytes_sent_per_step=bytes_sent(task.shapes, strategy, cluster.gpus, task.mixed, each // micro),
        flops_per_token=flops,
        seconds_per_step=(
            seconds_per_step(flops, task.tokens_per_step, cluster.gpus, cluster.tflops) if cluster.tflops else None
        ),
    )


def _fullest(task: Task, strategy: Strategy) -> ModelState:
    """Of all ranks, and of the moments between micro-steps and at the update, the one with the most gradients."""
    differ = strategy.stage in (1, 2) and not task.mixed  # else the ranks hold alike
    states = [
        model_state(task.shapes, strategy, task.cluster.gpus, task.mixed, rank, accumulating, task.zero)
        for rank in range(task.cluster.gpus if differ else 1)
        for accumulating in (False, True)
    ]
    return max(states, key=lambda state: state.gradients)
