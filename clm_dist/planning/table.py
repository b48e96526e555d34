"""An outlook as text."""

from clm_dist.planning.plan import Outlook
from clm_dist.planning.planner import CONTEXT_BYTES, FRAGMENTATION, GIB, Row

MIB = 2**20

HEADS = (
    *("strategy", "ckpt", "params", "grads", "optim", "buffers", "activ.", "peak", "total", "B", "largest B"),
    *("CPU/node", "sent/step", "cost"),
)


def text_of(outlook: Outlook) -> str:
    """The table, what it means, and what to do."""
    lines = [*_introduction(outlook), "", *_table(outlook), "", *_epoch(outlook), *_recommendation(outlook)]
    return "\n".join(lines)


def _unit(outlook: Outlook) -> tuple[str, int]:
    """In what the table counts: a small model's sizes would all be 0.00 GiB."""
    return ("GiB", GIB) if max(row.total for row in outlook.rows) >= GIB else ("MiB", MIB)


def _trained(outlook: Outlook) -> str:
    """How many are trained, where that is not all of them."""
    return "" if outlook.trained == outlook.parameters else f" ({outlook.trained:,} of them trained)"


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _introduction(outlook: Outlook) -> list[str]:
    cluster = outlook.cluster
    precision = "fp32" if outlook.mixed_precision == "no" else outlook.mixed_precision
    nodes = f" in {cluster.nodes} nodes" if cluster.nodes > 1 else ""
    lines = [
        f"{outlook.model}: {outlook.parameters:,} parameters{_trained(outlook)}, {precision}, blocks of "
        f"{outlook.block_size:,} tokens, "
        f"{outlook.global_batch_size:,} sequences = {outlook.tokens_per_step:,} tokens per step",
        f"{cluster.gpus} GPUs of {cluster.gpu_memory_gib:g} GiB{nodes}; {outlook.usable_bytes / GIB:.1f} GiB of each can be "
        f"planned with: {CONTEXT_BYTES / GIB:g} GiB is CUDA's and NCCL's own, {FRAGMENTATION:.0%} of the rest is lost to "
        "fragmentation",
        f"{_unit(outlook)[0]} on the fullest GPU with a micro-batch of B, the largest that fits and divides the batch; (B): "
        "does not fit",
    ]
    if outlook.buckets_note:
        lines.append(outlook.buckets_note)
    if outlook.by_formula:
        lines.append(f"activations are by formula (arXiv:2205.05198), the model cannot be traced: {outlook.by_formula}")
    return lines


def _table(outlook: Outlook) -> list[str]:
    rows, unit = outlook.rows, _unit(outlook)[1]
    least = min((row.cost_seconds for row in rows if row.fits and not row.host_bytes_per_node), default=1.0)
    cells = [HEADS, *(_cells(row, least, unit) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADS))]
    return ["  ".join(_aligned(cell, width, n) for n, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in cells]  # fmt: skip


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _cells(row: Row, least: float, unit: int) -> tuple[str, ...]:
    sizes = (row.parameters, row.gradients, row.optimizer_states, row.buffers, row.activations, row.logits, row.total)
    return (
        row.strategy,
        "yes" if row.activation_checkpointing is True else row.activation_checkpointing or "no",
        *(f"{one / unit:.2f}" for one in sizes),
        str(row.micro_batch_size) if row.fits else f"({row.micro_batch_size})",
        str(row.largest_micro_batch_size),
        f"{row.host_bytes_per_node / unit:.1f}" if row.host_bytes_per_node else "",
        f"{row.bytes_sent_per_step / unit:.2f}",
        f"{row.cost_seconds / least:.2f}" if row.fits and not row.host_bytes_per_node else "",
    )


def _checkpointing(row: Row) -> str:
    """The kind that a row has."""
    return ("selective " if row.activation_checkpointing == "selective" else "") + "activation checkpointing"


def _epoch(outlook: Outlook) -> list[str]:
    if outlook.steps_per_epoch is None:
        return [f"steps and tokens per epoch are not known: {outlook.epoch_note}"]
    return [f"one epoch: {outlook.steps_per_epoch:,} steps, {outlook.tokens_per_epoch:,} tokens"]


def _recommendation(outlook: Outlook) -> list[str]:
    best, cluster = outlook.recommended, outlook.cluster
    if best is None:
        least = min(outlook.rows, key=lambda row: row.total)
        ckpt = f" with {_checkpointing(least)}" if least.activation_checkpointing else ""
        return [
            f"nothing fits: {least.strategy}{ckpt} needs {size(least.total)} of {outlook.usable_bytes / GIB:.1f} "
            f"GiB a GPU and {size(least.host_bytes_per_node)} of CPU memory a node; take more or larger GPUs, or a "
            "smaller data.block_size or model"
        ]
    accumulation = outlook.global_batch_size // (cluster.gpus * best.micro_batch_size)
    ckpt = f", {_checkpointing(best)}" if best.activation_checkpointing else ""
    lines = [
        f"recommended: {best.strategy}{ckpt}, micro-batch {best.micro_batch_size}, {accumulation} "
        f"{'micro-step' if accumulation == 1 else 'micro-steps'} per step, "
        f"{size(best.total)} a GPU"
    ]
    if any(row.fits and row.sums_in_16_bits and row.cost_seconds < best.cost_seconds for row in outlook.rows):
        lines.append("zero1 is passed over: it would add up the gradients of micro-steps in 16 bits")
    if outlook.asked_checkpointing and not best.activation_checkpointing:
        asked = str(outlook.asked_checkpointing).lower()
        lines.append(f"train.activation_checkpointing={asked} is left out of it: it fits without, and computes less")
    if best.host_bytes_per_node and cluster.cpu_memory_gib is None:
        lines.append(f"it needs {size(best.host_bytes_per_node)} of CPU memory a node; check with --cpu-memory")
    if outlook.evaluation_note:
        lines.append(outlook.evaluation_note)
    lines += [_time(outlook, best), "", f"{outlook.command}"]
    return lines


def _time(outlook: Outlook, best: Row) -> str:
    if best.seconds_per_step is None:
        per_token = best.flops_per_token / 1e12
        measured = f"{per_token:.3g} x the tokens/s of one GPU in a short run"
        return f"time: not known; give --tflops X, stated, or measured: {measured}"
    text = f"time at {outlook.cluster.tflops:g} TFLOP/s a GPU: {best.seconds_per_step:.3g} s per step"
    text += f", {outlook.tokens_per_step / best.seconds_per_step:,.0f} tokens/s"
    if outlook.steps_per_epoch is not None:
        text += f", {outlook.steps_per_epoch * best.seconds_per_step / 3600:.3g} h per epoch"
    return text
