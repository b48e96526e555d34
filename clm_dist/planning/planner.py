"""Which way to lay a model over GPUs fits, with which micro-batch, and which one to take. Pure arithmetic.

Legend: B = micro_batch_size, sequences per GPU and forward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from clm_dist.disagreements import divisors
from clm_dist.errors import ConfigError
from clm_dist.fields import Checkpointing
from clm_dist.planning.communication import bytes_sent
from clm_dist.planning.estimate import cost_seconds, flops_per_token, seconds_per_step
from clm_dist.planning.memory import (
    FP32,
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
    zero: Mapping[str, ZeroSettings] = field(
        default_factory=dict
    )  # by strategy; DeepSpeed's own where one is not there

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.block_size

    @property
    def weights(self) -> int:
        """Bytes of the weights that the model computes with."""
        return (2 if self.mixed else FP32) * self.shapes.parameters


@dataclass(frozen=True)
class Row:
    """One way to lay the model over the GPUs; bytes on the fullest one, at `micro_batch_size`."""

    strategy: str
    activation_checkpointing: Checkpointing
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
    cost_seconds: float  # of a step by stated speeds, to compare rows: estimate.py
    sums_in_16_bits: bool  # gradients of several micro-steps


def precision_of(strategy: Strategy, mixed: bool) -> str:
    """What a strategy computes in: DDP keeps fp32 weights under autocast, DeepSpeed and FSDP2 cast them."""
    return "fp32" if not mixed else "bf16" if strategy.stage else "autocast"


def rows(task: Task, activations: Mapping[tuple[str, Checkpointing], Activations]) -> list[Row]:
    """Every strategy without and with activation checkpointing. activations: by (precision, checkpointing)."""
    found = []
    for strategy in STRATEGIES:
        for checkpointing in (False, "selective", True):
            line = activations.get((precision_of(strategy, task.mixed), checkpointing))
            if line is not None:  # None: the model cannot be checkpointed, or the selective kind was not asked for
                found.append(_row(task, strategy, checkpointing, line))
    return found


def recommend(found: list[Row]) -> Row | None:
    """Of the rows that fit the one of the least cost, without offload if there is any.

    Stage 1 in 16 bits adds up the gradients of micro-steps in 16 bits, where those of the last of many are rounded away:
    it is passed over unless a step has one micro-step, or nothing else fits. Offload is taken last, since the update of
    weights on the CPU is in no estimate here.
    """
    fitting = [row for row in found if row.fits]
    return min(
        fitting,
        key=lambda row: (row.strategy.endswith("_offload"), row.sums_in_16_bits, row.cost_seconds),
        default=None,
    )


def largest(fits: Callable[[int], bool]) -> int:
    """The largest B for which `fits`, which holds below any B for which it holds; 0 where there is none."""
    low, high = 0, MOST + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_evaluation(row: Row, task: Task, whole_logits: int) -> int:
    """Sequences of an evaluation for which a GPU has room beside weights and states.

    whole_logits: the vocabulary where logits are made whole (as the model gives them, in fp32, and log-probabilities); 0
    where they are made by chunks: then the widest thing is what one layer computes, for which 34 values a position and
    channel are enough (Korthikanti et al., arXiv:2205.05198, count 34 bytes that are kept).
    """
    room = task.cluster.usable - row.parameters - row.optimizer_states - row.buffers
    widest = whole_logits * ((2 if task.mixed else 0) + 2 * FP32) or 34 * FP32 * max(1, task.shapes.width)
    return max(0, room // (task.block_size * widest))


def _row(task: Task, strategy: Strategy, checkpointing: Checkpointing, line: Activations) -> Row:
    cluster, zero = task.cluster, task.zero.get(strategy.name, ZeroSettings())
    each = task.global_batch_size // cluster.gpus
    around = buffers(task.shapes, strategy, task.mixed, zero)
    several = _fullest(task, strategy, zero)
    one = model_state(task.shapes, strategy, cluster.gpus, task.mixed, zero=zero) if strategy.by_torch else several
    host = several.host * cluster.gpus // cluster.nodes
    enough_host = cluster.cpu_memory_gib is None or host <= cluster.cpu_memory_gib * GIB

    def state(sequences: int) -> ModelState:
        return one if sequences >= each else several  # a single micro-step leaves FSDP2 no whole gradients

    def total(sequences: int) -> int:
        held = state(sequences)
        return held.parameters + held.gradients + held.optimizer_states + around + line.peak.at(sequences)

    def fits(sequences: int) -> bool:
        return enough_host and total(sequences) <= cluster.usable

    most = max(largest(fits), each if fits(each) else 0)
    micro = max((b for b in range(1, most + 1) if each % b == 0), default=1)
    flops = flops_per_token(task.shapes, task.block_size, checkpointing)
    sent = bytes_sent(task.shapes, strategy, cluster.gpus, task.mixed, each // micro)
    return Row(
        strategy=strategy.name,
        activation_checkpointing=checkpointing,
        fits=most > 0,
        micro_batch_size=micro,
        largest_micro_batch_size=most,
        parameters=state(micro).parameters,
        gradients=state(micro).gradients,
        optimizer_states=state(micro).optimizer_states,
        buffers=around,
        activations=line.kept.at(micro),
        logits=line.peak.at(micro) - line.kept.at(micro),
        total=total(micro),
        by_paper=round(by_paper(task.shapes.trained, strategy.stage, cluster.gpus, sum(task.shapes.frozen))),
        host_bytes_per_node=host,
        bytes_sent_per_step=sent,
        flops_per_token=flops,
        seconds_per_step=(
            seconds_per_step(flops, task.tokens_per_step, cluster.gpus, cluster.tflops) if cluster.tflops else None
        ),
        cost_seconds=cost_seconds(
            flops * micro * task.block_size, task.weights, each // micro, sent, cluster.nodes, cluster.tflops
        ),
        sums_in_16_bits=strategy.stage == 1 and task.mixed and micro < each,
    )


def _fullest(task: Task, strategy: Strategy, zero: ZeroSettings) -> ModelState:
    """Of all ranks, and of the moments between micro-steps and at the update, the one with the most gradients."""
    differ = strategy.stage in (1, 2)  # else the first rank holds as much as any
    states = [
        model_state(task.shapes, strategy, task.cluster.gpus, task.mixed, rank, accumulating, zero)
        for rank in range(task.cluster.gpus if differ else 1)
        for accumulating in (False, True)
    ]
    return max(states, key=lambda state: state.gradients)


def check_cluster(cluster: Cluster, global_batch_size: int) -> None:
    """Refuses numbers that no cluster has, all at once."""
    problems = []
    given: dict[str, float | None] = {
        "--gpus": cluster.gpus,
        "--gpu-memory": cluster.gpu_memory_gib,
        "--nodes": cluster.nodes,
        "--cpu-memory": cluster.cpu_memory_gib,
        "--tflops": cluster.tflops,
    }
    for option, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"{option} {value} is not possible; give a number above 0")
    if not problems and cluster.gpus % cluster.nodes:
        problems.append(
            f"--gpus {cluster.gpus} cannot stand evenly in --nodes {cluster.nodes}; give the GPUs of all nodes together, "
            f"a multiple of {cluster.nodes}"
        )
    if not problems and cluster.usable <= 0:
        problems.append(f"--gpu-memory {cluster.gpu_memory_gib} GiB is less than CUDA itself takes; give 2 or more")
    if not problems and global_batch_size % cluster.gpus:
        problems.append(
            f"train.global_batch_size={global_batch_size} is not divisible by {cluster.gpus} GPUs; set a multiple of "
            f"{cluster.gpus}, or plan for one of {divisors(global_batch_size)} GPUs"
        )
    if problems:
        raise ConfigError(problems)
