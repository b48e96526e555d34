"""Exact evaluation: the sum of nll over the count of tokens, every block once, at every number of processes.

Legend: B sequences, T = block_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from clm_dist.model.objective import Objective
from clm_dist.progress import progress
from clm_dist.training.batches import Batch, Batches


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a split. Each token counts once and alike."""

    nll: float  # summed nats
    tokens: int  # scored tokens: T - 1 of every block (without padding; documents' first tokens too where they are isolated)
    correct: int  # tokens that were the likeliest by the model
    tokens_per_byte: float  # of the whole split

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows above 709

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte: comparable between tokenizers. Bits per scored token times tokens per byte of the split."""
        return self.loss / math.log(2) * self.tokens_per_byte

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the likeliest by the model."""
        return self.correct / max(1, self.tokens)

    def metrics(self) -> dict[str, float]:
        """The figures by their metric names."""
        return {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/accuracy": self.accuracy,
            "eval/nll": self.nll,
            "eval/tokens": self.tokens,
        }


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    objective: Objective,
    batches: Batches,
    micro_batch_size: int,
    tokens_per_byte: float,
    leave: Callable[[], bool] | None = None,
    sharded: bool = False,
) -> Evaluation | None:
    """Evaluates `model` on all blocks of `batches`. Every rank must call this; a rank may have nothing to do.

    model: not in a DDP wrapper, since ranks may run different numbers of forward passes. objective: of that model.

    leave: asked by every rank before each turn; where it says yes, there is no result. sharded: a forward pass is
    collective, so that a rank with nothing to do runs one whose result does not count.

    The batches are the same at every world size; batch j is computed by rank j % world_size and its sums (fp64) are put
    into row j of a table. Adding the tables of all ranks adds zeros only, and fsum rounds once: the result does not
    depend on how many processes there were, to the last bit where a forward pass does not.
    """
    blocks = len(batches.blocks)
    starts = range(0, blocks, micro_batch_size)
    table = torch.zeros(len(starts), 3, dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    stopped = False
    # not inference mode: what is gathered in it, or cached by the model (MEGA's positions), could not be trained with
    with torch.no_grad():
        turns = range(0, len(starts), accelerator.num_processes)
        for turn in progress(turns, "evaluating", "batches", visible=accelerator.is_main_process):
            if leave is not None and (stopped := leave()):
                break
            j = turn + accelerator.process_index
            spare = j >= len(starts)  # others have one more
            if spare and not sharded:
                continue
            first = starts[0] if spare else starts[j]
            batch = batches.batch(range(first, min(first + micro_batch_size, blocks)))
            sums = _sums(*objective.each(model, batch.inputs(), batch.scored), batch)
            if not spare:
                table[j] = sums
    model.train(was_training)
    if stopped:
        return None
    rows = accelerator.reduce(table, reduction="sum").tolist()  # sync
    nll, tokens, correct = (math.fsum(column) for column in zip(*rows, strict=True))
    return Evaluation(nll=nll, tokens=int(tokens), correct=int(correct), tokens_per_byte=tokens_per_byte)


def _sums(nll: torch.Tensor, correct: torch.Tensor, batch: Batch) -> torch.Tensor:
    """nll, scored tokens and correct tokens of a batch: (3,) fp64. nll, correct: (B, T - 1)."""
    if batch.scored is None:
        return torch.stack([nll.double().sum(), nll.new_tensor(nll.numel()).double(), correct.sum().double()])
    return torch.stack([nll.double().sum(), batch.scored.sum().double(), (correct & batch.scored).sum().double()])
