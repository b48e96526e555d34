"""The next-token loss, always ours and never the model's own.

`model(labels=input_ids).loss` is not it: of the causal-LM guide's 59 architectures 38 compute something else as they come
(heads that do not shift the labels, encoders that see the future), without an error. And Trainer 5.23 divides GPT-2's by
T targets a block where there are T - 1 (docs/parity.md).

Legend: B sequences, T = block_size, V = vocabulary.
"""

import torch
import torch.nn.functional as F

from clm_dist.model.kernels import IGNORED


def next_tokens(input_ids: torch.Tensor, scored: torch.Tensor | None = None) -> torch.Tensor:
    """What each position has to predict, (B, T) int64; IGNORED at the last one of a block, and where nothing is scored.

    input_ids: (B, T). scored: (B, T - 1) bool, the tokens that count (None: all).
    """
    targets = input_ids[:, 1:] if scored is None else input_ids[:, 1:].masked_fill(~scored, IGNORED)
    # not cut off the logits: that would copy the largest tensor there is
    return F.pad(targets, (0, 1), value=IGNORED)


def next_token_nll(logits: torch.Tensor, input_ids: torch.Tensor, scored: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood in nats of each token given those before it.

    logits: (B, T, V), any floating type; computed in fp32. input_ids: (B, T). scored: (B, T - 1) bool, the tokens that
    count (None: all); others are 0 and have no gradient. Returns (B, T - 1): the first token of a block has nothing
    before it and is not scored.
    """
    targets = next_tokens(input_ids, scored)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view_as(targets)[:, :-1]
