"""From token ids to their loss: by the head's chunks where a model's head is known, else by all of its logits.

Legend: B sequences, T = block_size, V = vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch

from clm_dist.model.head import Head, UnknownHeadError, find_head
from clm_dist.model.loss import next_token_nll, next_tokens

Inputs = Mapping[str, torch.Tensor]  # input_ids (B, T), and position_ids where documents are kept apart


class Objective:
    """What is learned and measured of a model. It stays the same when an engine wraps the model."""

    def __init__(self, head: Head | None = None, why: str | None = None) -> None:
        self.head, self.why = head, why  # why: logits are whole, where they are

    def summed(self, model: Any, inputs: Inputs, scored: torch.Tensor | None = None) -> torch.Tensor:
        """Summed nats of a batch, (), with gradients. scored: (B, T - 1) bool, the tokens that count; None: all."""
        ids = inputs["input_ids"]
        if self.head is not None:
            return self.head.summed(model, inputs, next_tokens(ids, scored))
        return next_token_nll(model(**inputs).logits, ids, scored).sum()

    def each(self, model: Any, inputs: Inputs, scored: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats of each token but the first of a block, (B, T - 1) fp32, 0 where it is not scored; and whether it was the
        likeliest, bool. Without gradients."""
        ids = inputs["input_ids"]
        if self.head is not None:
            nll, correct = self.head.each(model, inputs, next_tokens(ids, scored))
            return nll[:, :-1], correct[:, :-1]
        logits = model(**inputs).logits
        return next_token_nll(logits, ids, scored), logits[:, :-1].argmax(-1) == ids[:, 1:]


def find_objective(model: Any, chunked: bool = True) -> Objective:
    """That of a model in fp32 which no engine has yet. chunked: whether logits may be made a chunk at a time."""
    if not chunked:
        return Objective()
    try:
        return Objective(find_head(model))
    except UnknownHeadError as error:
        return Objective(why=str(error))
