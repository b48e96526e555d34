"""Bytes of parameters, gradients and optimizer states on one rank. Pure arithmetic.

ZeRO (Rajbhandari et al., arXiv:1910.02054, section 5) shares optimizer states (stage 1), gradients too (2), parameters
too (3) among W ranks. For mixed-precision Adam it counts 2 bytes of parameters, 2 of gradients and K = 12 of states for
each of psi parameters. What DeepSpeed and torch really hold differs from that in ways that add up, and is what is counted
here, to the byte (tests/distributed/test_plan_live.py): fp32 gradients, padding, parameters that stage 3 keeps whole.

Legend: W = world_size. "mixed": bf16 or fp16 training; DDP then keeps all weights in fp32 (autocast), DeepSpeed keeps
16-bit weights and an fp32 copy of its own part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clm_dist.planning.shapes import Shapes

ALIGNMENT = 2  # elements, times W: what DeepSpeed pads a group to under stages 1 and 2 (nccl_start_alignment_factor)
FP32 = 4
MOMENTS = 8  # Adam's two, in fp32
STEP = 4  # Adam's count of updates, an fp32 scalar for every tensor that it updates


@dataclass(frozen=True)
class Strategy:
    """A way to lay a model over ranks."""

    name: str  # of accelerate_configs/NAME.yaml
    stage: int  # of ZeRO; 0: DDP, nothing is shared
    offload_optimizer: bool = False  # states and gradients in the memory of the CPU
    offload_parameters: bool = False  # stage 3: the parts of the parameters too
    by_torch: bool = False  # FSDP2 and not DeepSpeed

    @property
    def by_deepspeed(self) -> bool:
        """Whether DeepSpeed does it, which keeps 16-bit weights and an fp32 copy of the rank's part."""
        return self.stage > 0 and not self.by_torch


# from the least sharing to the most, which is from the least communication to the most
STRATEGIES = (
    Strategy("ddp", 0),
    Strategy("zero1", 1),
    Strategy("zero2", 2),
    Strategy("zero3", 3),
    Strategy("fsdp2", 3, by_torch=True),
    Strategy("zero2_offload", 2, offload_optimizer=True),
    Strategy("zero3_offload", 3, offload_optimizer=True, offload_parameters=True),
)


@dataclass(frozen=True)
class ZeroSettings:
    """The fields of DeepSpeed's `zero_optimization` that cost memory, in elements. The defaults are DeepSpeed's own, which
    hold where a file of ds_configs/ says nothing."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False  # stages 1 and 2: a second bucket, filled while the first is sent
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000


@dataclass(frozen=True)
class ModelState:
    """Bytes on one rank: on its GPU, and in the memory of the CPU for it."""

    parameters: int
    gradients: int  # that wait for the update
    optimizer_states: int  # moments, step counts, and DeepSpeed's fp32 copy of the weights
    host: int = 0


@dataclass(frozen=True)
class Line:
    """Bytes that grow evenly with B."""

    fixed: float
    per_sequence: float

    def at(self, sequences: int) -> int:
        """Bytes for so many sequences."""
        return max(0, round(self.fixed + self.per_sequence * sequences))


@dataclass(frozen=True)
class Envelope:
    """The largest of several lines: which moment is the worst depends on B."""

    lines: tuple[Line, ...]

    @classmethod
    def over(cls, lines: Iterable[Line]) -> "Envelope":
        """Only those of `lines` that are the largest somewhere, from the flattest to the steepest."""
        kept: list[Line] = []
        for line in sorted(set(lines), key=lambda line: (line.per_sequence, line.fixed)):
            while kept and (kept[-1].fixed <= line.fixed or (len(kept) > 1 and _below(kept[-2], kept[-1], line))):
                kept.pop()
            kept.append(line)
        return cls(tuple(kept))

    def at(self, sequences: int) -> int:
        """Bytes for so many sequences."""
        return max(line.at(sequences) for line in self.lines)


def _below(flatter: Line, line: Line, steeper: Line) -> bool:
    """Whether `line` is nowhere above both others: they meet before it meets the steeper one."""
    rise = (flatter.fixed - steeper.fixed) * (line.per_sequence - flatter.per_sequence)
    return rise <= (flatter.fixed - line.fixed) * (steeper.per_sequence - flatter.per_sequence)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-step beside parameters and their gradients."""

    kept: Line  # from the forward pass of each layer to its backward pass (bf16 copies of weights by autocast too)
    peak: Envelope  # at the worst moment: with logits, log-probabilities, their gradients; or a layer recomputed
    counted: bool  # False: by formula


def model_state(
    shapes: Shapes,
    strategy: Strategy,
    world_size: int,
    mixed: bool,
    rank: int = 0,
    accumulating: bool = False,
    zero: ZeroSettings | None = None,
) -> ModelState:
    """What one rank holds at the moment before an update (parameters and states: after it).

    Gradients are those of the trained parameters as they are kept until the update: under DDP all of them; under stage 1
    all of them while accumulating, and at the update the tensors that lie in the rank's part, in the type of the weights;
    under stages 2 and 3 those of the rank's part in fp32; under FSDP2 all of them in fp32 while accumulating, and the
    rank's rows at the update. accumulating: between two micro-steps instead of at the update.
    """
    zero = zero or ZeroSettings()
    if strategy.stage == 0:
        count = len(shapes.matrices) + len(shapes.vectors)
        states = MOMENTS * shapes.trained + STEP * count
        return ModelState(FP32 * shapes.parameters, FP32 * shapes.trained, states)
    if strategy.by_torch:
        return _fsdp2(shapes, world_size, rank, accumulating)
    if strategy.stage == 3:
        return _stage_3(shapes, strategy, world_size, mixed, zero)
    return _stage_1_or_2(shapes, strategy, world_size, mixed, rank, accumulating)


def by_paper(parameters: int, stage: int, world_size: int, frozen: int = 0) -> float:
    """Bytes of the model's state by the ZeRO paper (figure 1): 2 + 2 + 12 for each parameter, the shared ones over W.

    frozen: parameters beside them that have no gradient and no states.
    """
    whole = {0: 16, 1: 4, 2: 2, 3: 0}[stage]
    return parameters * (whole + (16 - whole) / world_size) + 2 * frozen / (world_size if stage == 3 else 1)


def _stage_1_or_2(
    shapes: Shapes, strategy: Strategy, world_size: int, mixed: bool, rank: int, accumulating: bool
) -> ModelState:
    """Each group lies in one padded buffer, of which every rank updates an equal part."""
    width = 2 if mixed else FP32
    parts = [_padded(sum(group), ALIGNMENT * world_size) // world_size for group in shapes.groups]
    parameters = width * (sum(parts) * world_size + sum(shapes.frozen))
    states = (FP32 + MOMENTS) * sum(parts) + STEP * len(parts)
    if strategy.offload_optimizer:
        # beside the states: their gradients, and a 16-bit copy of the part on its way back to the GPU
        host = states + (FP32 + width) * sum(parts)
        return ModelState(parameters, 0, 0, host)
    if mixed and strategy.stage == 2:
        gradients = FP32 * sum(parts)
    elif accumulating and strategy.stage == 1:
        gradients = width * shapes.trained
    else:
        pairs = zip(shapes.groups, parts, strict=True)
        gradients = width * sum(_whole_in_part(group, part, rank, not accumulating) for group, part in pairs)
    return ModelState(parameters, gradients, states)


def _whole_in_part(sizes: Sequence[int], part: int, rank: int, padded: bool) -> int:
    """Elements of the tensors of which some lies in a rank's part, each whole; at the update with the padding behind."""
    begin, end = rank * part, (rank + 1) * part
    whole = offset = 0
    for size in sizes:
        if offset < end and offset + size > begin:
            whole += size
        offset += size
    padding = end - max(begin, min(end, offset))
    return whole + (padding if padded else 0)


def _stage_3(shapes: Shapes, strategy: Strategy, world_size: int, mixed: bool, zero: ZeroSettings) -> ModelState:
    """Each tensor is cut into W equal parts, padded at its end; small ones are kept whole beside."""
    width = 2 if mixed else FP32
    part = sum(-(-size // world_size) for group in shapes.groups for size in group)
    every = (*shapes.matrices, *shapes.vectors, *shapes.frozen)
    shares = width * sum(-(-size // world_size) for size in every)
    small = [size for size in every if size <= zero.stage3_param_persistence_threshold]
    whole = width * sum(_padded(size, world_size) for size in small)
    tensors = sum(_sub_groups(group, world_size, zero.sub_group_size) for group in shapes.groups)
    states = (FP32 + MOMENTS) * part + STEP * tensors
    gradients = FP32 * part
    if not strategy.offload_optimizer:
        return ModelState(shares + whole, gradients, states)
    if not strategy.offload_parameters:
        return ModelState(shares + whole, 0, 0, states + gradients)
    return ModelState(whole, 0, 0, states + gradients + shares)


def _fsdp2(shapes: Shapes, world_size: int, rank: int, accumulating: bool) -> ModelState:
    """Each rank has rows of every tensor as torch.chunk cuts them, in fp32: buffers have room for as many rows on every
    rank, states only for those that there are. Between micro-steps nothing is exchanged: whole gradients wait."""
    every = (*shapes.matrices, *shapes.vectors, *shapes.frozen)
    count = len(shapes.matrices) + len(shapes.vectors)
    room = mine = held = 0
    for number, (size, rows) in enumerate(zip(every, shapes.rows, strict=True)):
        each = -(-rows // world_size)
        share = each * (size // rows)
        held += share
        if number < count:
            room += share
            mine += max(0, min(each, rows - rank * each)) * (size // rows)
    gradients = FP32 * (shapes.trained if accumulating else room)
    return ModelState(FP32 * held, gradients, MOMENTS * mine + STEP * count)


def _sub_groups(sizes: Sequence[int], world_size: int, limit: int) -> int:
    """How many pieces DeepSpeed updates one after another: a piece is full when it reaches the limit."""
    parts = [-(-size // world_size) for size in sizes]
    if limit >= sum(parts):
        return 1
    count = held = 0
    for number, part in enumerate(parts, 1):
        held += part
        if held >= limit or number == len(parts):
            count, held = count + 1, 0
    return count


def buffers(shapes: Shapes, strategy: Strategy, mixed: bool, zero: ZeroSettings | None = None) -> int:
    """Bytes on the GPU for communication and for parameters that are together only for a while: upper bounds.

    DDP's gradients lie in its buckets (gradient_as_bucket_view), so it has none. DeepSpeed fills a bucket, flattens it into
    a copy and, where weights are 16-bit, makes that fp32; a tensor larger than the bucket goes by itself. Stage 3 has at
    most stage3_max_live_parameters whole at one time, and those fetched ahead.
    """
    zero, width = zero or ZeroSettings(), 2 if mixed else FP32
    if strategy.stage == 0:
        return shapes.buffer_bytes
    if strategy.by_torch:
        return shapes.buffer_bytes + _gathered_by_torch(shapes, width)
    largest = max((*shapes.matrices, *shapes.vectors))
    sent = max(zero.reduce_bucket_size, largest)  # at once
    if strategy.stage == 3:
        bucket = FP32 * zero.reduce_bucket_size + 2 * FP32 * sent
        live = width * min(shapes.parameters, zero.stage3_max_live_parameters + zero.stage3_prefetch_bucket_size)
    else:
        bucket = width * zero.reduce_bucket_size * (2 if zero.overlap_comm else 1) + width * sent
        bucket += FP32 * sent if mixed else 0
        live = 0
    offload = width * largest if strategy.offload_optimizer else 0  # a tensor on its way to the CPU
    return shapes.buffer_bytes + bucket + offload + live


def _gathered_by_torch(shapes: Shapes, width: int) -> int:
    """FSDP2: what is in no layer stays whole; a layer is, the next is fetched, and lies once more in the buffer it came in;
    gradients of one of these are whole, and once more in fp32 to be sent."""
    most = max(shapes.largest_block, shapes.outside)
    return width * (shapes.outside + 3 * shapes.largest_block) + (width + FP32) * most


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
