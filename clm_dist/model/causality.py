"""Whether a model is a left-to-right one, seen on itself: later tokens are changed, earlier predictions must not move.

At the run's own block length, since sparse, chunked and hashed attention are other code on long blocks than on short ones
(BigBird's begins beyond 704 tokens), and before a step is taken.

Legend: T = block_size, V = vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

from clm_dist.errors import UserError
from clm_dist.model.configuration import row_of

NOISE = 1e-8  # of the largest logit, in fp64: experts sort tokens, and sums of another order differ in the last bits
NOISE_FP32 = 1e-5  # where a model has kernels that do not compute in fp64
# What models say about which way they look, and the value that looks back only.
_DIRECTIONS = {
    "is_decoder": True, "causal": True, "is_causal": True, "bidirectional": False, "attn_type": "uni",
    "use_bidirectional_attention": False,
}  # fmt: skip

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (1, T, V) logits, (1, T) ids -> (1, T - 1) nats


def check_causality(model: Any, block_size: int, name: str, loss: Loss) -> None:
    """UserError where a prediction depends on a later token, ignores its own, or is scored by another than the next.

    A pass over (1, T) tokens as they are, and one for each place from where on they are others. The places are no multiples
    of any chunk. Weights and random numbers are as before afterwards.
    """
    device = next(model.parameters()).device
    vocabulary = min(_vocabulary(model), 2**31)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, block_size), generator=generator).to(device)
    others = ((ids + 1 + torch.randint(vocabulary - 1, ids.shape, generator=generator).to(device)) % vocabulary).long()
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            logits = _logits(model, ids)
            _check_logits(logits, ids, name)
            _check_loss(logits, ids, loss, name)
            for cut in cuts(block_size):
                changed = torch.where(torch.arange(block_size, device=device) < cut, ids, others)
                moved = (_logits(model, changed) - logits).abs().amax(-1)[0]  # (T,)
                _check_own(moved, cut, name)
                if moved[:cut].any() or not moved.isfinite().all():
                    _settle(model, ids, changed, cut, moved, logits, name)
    finally:
        model.train(was_training)


def cuts(block_size: int) -> list[int]:
    """From where on tokens are changed: the last alone, the second half, most. Odd numbers: no chunk ends there."""
    return sorted(
        {max(1, cut) for cut in (block_size - 1, block_size // 2 | 1, block_size // 5 | 1) if cut < block_size}
    )


def _settle(model: Any, ids: Any, changed: Any, cut: int, moved: Any, logits: Any, name: str) -> None:
    """Whether what moved is a leak, or experts that added the same numbers in another order: fp64 tells them apart."""
    row = row_of(model.config)
    allowed = max(NOISE, row.noise if row else 0.0)
    try:
        exact = model.double()
        one, other = _logits(exact, ids), _logits(exact, changed)
        if one.isfinite().all() and other.isfinite().all():
            moved, logits = (one - other).abs().amax(-1)[0], one
        else:
            allowed = 0.0
    except Exception:  # whatever a kernel says that knows no fp64
        allowed = NOISE_FP32
    finally:
        model.float()
    leaks = ~(moved[:cut] <= allowed * logits.abs().max())  # NaN is one
    if leaks.any():
        position = int(leaks.nonzero()[0])
        raise UserError(
            f"{name} is no left-to-right model: its prediction at position {position} moves by {moved[position].item():.2g} "
            f"when tokens from position {cut} on are others, which it has to predict; {_remedy(model)} "
            "(model.check_causality=false trains it all the same)"
        )


def _check_own(moved: torch.Tensor, cut: int, name: str) -> None:
    if not moved[cut] > 0:
        raise UserError(
            f"{name} does not look at the token at position {cut} when it predicts the next one: its logits stand one place "
            "further on than those of a causal language model, and would be taught the token after the next; take another "
            "model (model.check_causality=false trains it all the same)"
        )


def _check_logits(logits: torch.Tensor, ids: torch.Tensor, name: str) -> None:
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise UserError(
            f"{name} gives logits of shape {tuple(logits.shape)} for {ids.shape[1]} tokens; needed is one row of its "
            "vocabulary for each: take another model"
        )
    if not logits.isfinite().all():
        raise UserError(
            f"{name} gives logits that are no finite numbers before its first step; give weights that are, or sizes in "
            "model.config.* that it can begin with (model.check_causality=false trains it all the same)"
        )


def _check_loss(logits: torch.Tensor, ids: torch.Tensor, loss: Loss, name: str) -> None:
    """The loss at position t is that of token t + 1, computed here by hand at a few places."""
    nll = loss(logits, ids)
    last = ids.shape[1] - 1
    for place in sorted({0, last // 2, last - 1} & set(range(last))):
        by_hand = logits[0, place].double().logsumexp(-1) - logits[0, place, ids[0, place + 1]].double()
        if nll.shape != (1, last) or not torch.isclose(nll[0, place].double(), by_hand, rtol=1e-4, atol=1e-4):
            given = f"{nll[0, place].item():.6g}" if nll.shape == (1, last) else f"of shape {tuple(nll.shape)}"
            raise UserError(
                f"the loss of {name} at position {place} is {given}, and that of the next token is {by_hand.item():.6g}: it "
                "is the loss of another token, which is clm-dist's own mistake; report it with the recipe, and train nothing"
            )


def _remedy(model: Any) -> str:
    """What to set, as far as the architecture or its configuration tells."""
    row, text = row_of(model.config), model.config.get_text_config()
    wanted = dict(row.needs) if row else {}
    wanted |= {key: value for key, value in _DIRECTIONS.items() if key not in wanted and hasattr(text, key)}
    wrong = {key: value for key, value in wanted.items() if getattr(text, key, value) != value}
    if not wrong:
        return "take a model with causal attention"
    return "set " + " ".join(f"model.config.{key}={value}".replace("True", "true").replace("False", "false")
                             for key, value in wrong.items())  # fmt: skip


def _vocabulary(model: Any) -> int:
    """How many ids there are: those of the text, which the head can tell apart."""
    return int(model.config.get_text_config().vocab_size)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits
