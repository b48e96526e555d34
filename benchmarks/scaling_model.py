"""How long a training step takes on many GPUs: the cost of collectives, and a simulation of what of it computing hides.

Pure arithmetic; docs/scaling.md has the formulas. A message of n bytes over a link costs n / bandwidth and, for every hop,
the link's latency. What is sent, when and in which pieces is what the engines of this project send: the bytes are those
of `clm_dist.planning.communication`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import ceil, log2

from clm_dist.planning.memory import FP32, Strategy

MIB = 2**20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB  # bytes of DDP's buckets: torch's own sizes, which this project leaves
SMALL = 64  # bytes: what ranks agree on in each step, and the sum of a sharded gradient norm
UPDATE_BYTES = 40  # a parameter: norm (4), clipping (8), AdamW (reads 16, writes 12), all of it in fp32


@dataclass(frozen=True)
class Link:
    """One GPU's way to others."""

    bandwidth: float  # bytes a second that a GPU sends, while it receives as many
    latency: float  # seconds a hop


@dataclass(frozen=True)
class Fabric:
    """Nodes of some GPUs, and a network between them."""

    node: Link
    network: Link
    gpus_per_node: int = 8
    launch: float = 0.0  # seconds that every collective costs before its first byte


@dataclass(frozen=True)
class Tensor:
    """A trained tensor of a model."""

    size: int  # elements
    work: int  # of the computing, as multiplying parameters: its size, or 0 where it is only looked up
    block: int  # the layer that it lies in; -1: none


@dataclass(frozen=True)
class Anatomy:
    """The tensors of a model in its own order, in which the forward pass meets them."""

    tensors: tuple[Tensor, ...]
    head: int = 0  # work of a head that shares the embedding: last in the forward pass, first in the backward pass
    hidden: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def work(self) -> int:
        """Parameters that multiply."""
        return sum(tensor.work for tensor in self.tensors) + self.head


@dataclass(frozen=True)
class Compute:
    """Seconds of one GPU by itself."""

    forward: float  # of a micro-step
    backward: float
    update: float  # of the whole model, once a step

    def with_micro_batch(self, times: float) -> "Compute":
        """For so many times the sequences in a micro-step, each of which takes as long as before."""
        return Compute(self.forward * times, self.backward * times, self.update)


@dataclass(frozen=True)
class Message:
    """What is exchanged as one, and the share of the backward pass after which it is there."""

    size: int  # bytes
    ready: float


@dataclass(frozen=True)
class Unit:
    """What stage 3 or FSDP2 gathers as one."""

    weights: int  # bytes
    gradients: int
    work: float  # share of the computing


def split(step: float, parameters: int, memory: float, checkpointing: bool, micro_steps: int = 1) -> Compute:
    """A measured step in its parts: the update moves bytes at `memory` bytes a second, a backward pass takes twice as long
    as a forward pass (arXiv:2204.02311, appendix B), and once more a forward pass where layers are computed again."""
    update = UPDATE_BYTES * parameters / memory
    micro_step = (step - update) / micro_steps
    forward = micro_step / (4 if checkpointing else 3)
    return Compute(forward, micro_step - forward, update)


def ring_pass(size: float, ranks: int, link: Link) -> float:
    """A reduce-scatter or an all-gather of `size` bytes: each rank sends a part of them (ranks - 1) times."""
    return (ranks - 1) / ranks * size / link.bandwidth + (ranks - 1) * link.latency


def tree_all_reduce(size: float, ranks: int, link: Link) -> float:
    """Two trees, each for half of the bytes (Sanders, Speck & Traeff 2009): as NCCL does it where a ring is too long."""
    return 2 * size / link.bandwidth + 2 * ceil(log2(ranks)) * link.latency


def one_pass(size: float, gpus: int, fabric: Fabric) -> float:
    """A reduce-scatter or an all-gather over nodes: within each, then as many rings between them as a node has GPUs."""
    if gpus == 1 or size == 0:
        return 0.0
    inner, outer = _levels(gpus, fabric)
    return fabric.launch + ring_pass(size, inner, fabric.node) + ring_pass(size / inner, outer, fabric.network)


def all_reduce(size: float, gpus: int, fabric: Fabric) -> float:
    """Both passes within a node, and between nodes a ring or trees, whichever is sooner."""
    if gpus == 1 or size == 0:
        return 0.0
    inner, outer = _levels(gpus, fabric)
    between = 2 * ring_pass(size / inner, outer, fabric.network)
    if outer > 1:
        between = min(between, tree_all_reduce(size / inner, outer, fabric.network))
    return fabric.launch + 2 * ring_pass(size, inner, fabric.node) + between


def _levels(gpus: int, fabric: Fabric) -> tuple[int, int]:
    inner = min(gpus, fabric.gpus_per_node)
    if gpus % inner:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {inner}")
    return inner, gpus // inner


def backward_order(model: Anatomy) -> Iterator[tuple[Tensor, float]]:
    """Tensors as their gradients come, each with the share of the backward pass that is then done."""
    done = model.head
    for tensor in reversed(model.tensors):
        done += tensor.work
        yield tensor, done / model.work


def ddp_buckets(model: Anatomy, first: int = FIRST_BUCKET, cap: int = BUCKET) -> list[Message]:
    """DDP's buckets (arXiv:2006.15704): full when it has reached its size, sent when its last gradient is there."""
    messages: list[Message] = []
    held, ready = 0, 0.0
    for tensor, ready in backward_order(model):
        held += FP32 * tensor.size
        if held >= (cap if messages else first):
            messages.append(Message(held, ready))
            held = 0
    return [*messages, Message(held, ready)] if held else messages


def zero_buckets(model: Anatomy, limit: int) -> list[Message]:
    """DeepSpeed's: a bucket of so many elements is sent when the next tensor does not go into it; large ones go alone."""
    messages: list[Message] = []
    held, ready = 0, 0.0
    for tensor, done in backward_order(model):
        if held and held + tensor.size > limit:
            messages.append(Message(FP32 * held, ready))
            held = 0
        held, ready = held + tensor.size, done
    return [*messages, Message(FP32 * held, ready)]


def last_arrival(messages: Iterable[Message], backward: float, cost: Callable[[float], float], overlap: bool) -> float:
    """Seconds from the begin of the backward pass until it and the last exchange are over. One link: messages queue."""
    link = 0.0
    for message in messages:
        begin = message.ready * backward if overlap else backward
        link = max(link, begin) + cost(message.size)
    return max(link, backward)


def units_of(model: Anatomy, strategy: Strategy, width: int) -> list[Unit]:
    """FSDP2 gathers a layer as one; stage 3 each tensor of more than 10 x hidden elements, and keeps small ones whole,
    which are counted with the next large one here: an upper bound."""
    if strategy.by_torch:
        groups = [list(group) for _, group in groupby(model.tensors, key=lambda tensor: tensor.block)]
    else:
        groups = [[]]
        for tensor in model.tensors:
            groups[-1].append(tensor)
            if tensor.size > 10 * model.hidden:
                groups.append([])
    units = [
        Unit(width * size, FP32 * size, sum(tensor.work for tensor in group) / model.work)
        for group in groups
        if (size := sum(tensor.size for tensor in group))
    ]
    return [*units, Unit(0, 0, model.head / model.work)] if model.head else units


def sharded_micro_step(
    units: list[Unit], compute: Compute, cost: Callable[[float], float], exchange: bool, overlap: bool
) -> float:
    """Seconds of a micro-step whose weights are gathered unit by unit, one ahead of computing, in both passes; a unit's
    gradients are reduced and scattered (`exchange`) when its backward pass is done. One link: messages queue."""
    forward = [(unit, unit.work * compute.forward, False) for unit in units]
    backward = [(unit, unit.work * compute.backward, exchange) for unit in reversed(units)]
    if not overlap:
        sent = sum(2 * cost(unit.weights) + (cost(unit.gradients) if exchange else 0) for unit in units)
        return compute.forward + compute.backward + sent
    link = begun = done = 0.0
    waiting = 0  # bytes of gradients of the unit that was just computed
    for unit, seconds, scatter in (*forward, *backward):
        arrived = max(link, begun) + cost(unit.weights) if unit.weights else 0.0  # asked for when the one before began
        link = max(link, arrived)
        if waiting:
            link = max(link, done) + cost(waiting)
        begun = max(done, arrived)
        done = begun + seconds
        waiting = unit.gradients if scatter else 0
    return max(link, done) + cost(waiting) if waiting else done


def step_seconds(
    model: Anatomy,
    strategy: Strategy,
    gpus: int,
    compute: Compute,
    fabric: Fabric,
    micro_steps: int = 1,
    width: int = 2,
    overlap: bool = True,
    bucket: int | None = None,
) -> float:
    """Seconds of one optimizer step.

    width: bytes of a weight on its way. overlap: whether computing can go on meanwhile. bucket: elements of the buckets of
    stages 1 and 2, which then are sent meanwhile too (`overlap_comm`); None: hidden squared, and they are not, which is
    what ds_configs/ come to.
    """

    def reduced(size: float) -> float:
        return all_reduce(size, gpus, fabric)

    def passed(size: float) -> float:
        return one_pass(size, gpus, fabric)

    micro_step = compute.forward + compute.backward
    if strategy.stage == 0:
        last = compute.forward + last_arrival(ddp_buckets(model), compute.backward, reduced, overlap)
        return (micro_steps - 1) * micro_step + last + reduced(SMALL) + compute.update
    end = 2 * reduced(SMALL) + compute.update / gpus
    if strategy.stage == 3:
        units = units_of(model, strategy, width)
        quiet = sharded_micro_step(units, compute, passed, not strategy.by_torch, overlap)
        last = sharded_micro_step(units, compute, passed, True, overlap)
        return (micro_steps - 1) * quiet + last + end
    messages, hidden = zero_buckets(model, bucket or model.hidden**2), overlap and bucket is not None
    exchanging = compute.forward + last_arrival(messages, compute.backward, reduced, hidden)
    exchanges = micro_steps if strategy.stage == 2 else 1
    micro = exchanges * exchanging + (micro_steps - exchanges) * micro_step
    return micro + end + passed(width * model.parameters)
