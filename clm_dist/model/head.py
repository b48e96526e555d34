"""A model's last linear layer, made to say the loss of its logits in their place.

The layer's forward is replaced, not the layer: what an engine has hung on it (DeepSpeed and FSDP2 gather its weights around
its forward and its backward pass) stays, and so do the names of the weights. What the model does to logits afterwards
(Cohere and Granite scale them, Gemma 2 bends them) is found out by giving it numbers, and done to each chunk of logits; the
loss then goes the same way out, so small that bending leaves it as it is.

Legend: B sequences, T = block_size, d width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clm_dist.errors import RunError
from clm_dist.model.chunks import Output, each_nll, summed_nll
from clm_dist.model.loss import next_token_nll, next_tokens
from clm_dist.model.positions import max_positions

SMALL = 2.0**-32  # a power of two, and the loss of a batch times it is nothing to a tanh
NUMBERS = (-40.0, -7.0, -1.0, 1.0, 7.0, 40.0)  # that are sent through what follows the layer
PROBE = 2, 16  # (B, T) of the proof; fewer tokens where a model reads fewer
ALLOWED = 1e-5  # relative: the order of sums in fp32


class UnknownHeadError(Exception):
    """Why the logits have to be made whole."""


class Head:
    """The output layer of `model`, which computes logits as before unless it is asked for a loss."""

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise UnknownHeadError(f"its output layer is no plain linear layer but {type(layer).__name__}")
        self.layer: nn.Linear = layer
        self.scale, self._shrink = 1.0, 1.0
        self.cap: float | None = None
        self._targets: torch.Tensor | None = None
        self._numbers: torch.Tensor | None = None
        self._each: tuple[torch.Tensor, torch.Tensor] | None = None
        self._calls = 0
        layer.forward = self._forward  # type: ignore[method-assign, assignment]

    def detach(self) -> None:
        """The layer is as it was."""
        del self.layer.forward

    def summed(self, model: Any, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Summed nats of the targets, (B, T) with IGNORED where none counts: (), fp32. model: what to call, around the one
        whose head this is."""
        with self._asked(targets):
            out: torch.Tensor = model(**inputs).logits
        self._check(out)
        return out.view(()) * (1 / (self.scale * self._shrink))

    @torch.no_grad()
    def each(
        self, model: Any, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats of each target, (B, T) fp32, and whether it was the likeliest, (B, T) bool."""
        with self._asked(targets):
            model(**inputs)
        found, self._each = self._each, None
        if found is None:
            raise RunError(f"{type(self.layer).__name__} was not asked for the loss; set train.chunked_loss=false")
        nll, correct = found
        return nll.view(targets.shape), correct.view(targets.shape)

    def find_out(self, model: Any, ids: torch.Tensor) -> None:
        """What happens to the layer's outputs before they are the model's logits; UnknownHeadError where it is neither a
        scale nor a soft cap."""
        self._numbers = torch.tensor(NUMBERS, device=ids.device)
        try:
            out = model(input_ids=ids).logits.float()
        finally:
            numbers, self._numbers = self._numbers, None
        if out.shape != (*ids.shape, len(NUMBERS)):
            raise UnknownHeadError(f"{type(model).__name__} changes the shape of its logits")
        seen = out[0, 0]
        scale = (seen[-1] / numbers[-1]).item()
        if scale > 0 and torch.allclose(seen, numbers * scale, rtol=1e-5):
            self.scale = 1.0 if abs(scale - 1) < 1e-6 else scale
            return
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if cap and torch.allclose(seen, cap * torch.tanh(numbers / cap), rtol=1e-5):
            self.cap, self._shrink = float(cap), SMALL
            return
        raise UnknownHeadError(f"{type(model).__name__} changes its logits in a way that is not known")

    @contextmanager
    def _asked(self, targets: torch.Tensor) -> Iterator[None]:
        self._targets, self._calls = targets, 0
        try:
            yield
        finally:
            self._targets = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._numbers is not None:
            return self._numbers.expand(*hidden.shape[:-1], -1).clone()
        if self._targets is None:
            return nn.functional.linear(hidden, self.layer.weight, self.layer.bias)
        self._calls += 1
        if hidden.shape[:-1] != self._targets.shape:
            raise UnknownHeadError(f"its output layer is given {tuple(hidden.shape)}, not a vector for each token")
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), self._targets.reshape(-1)
        output = Output(self.layer.weight, self.layer.bias, self.scale, self.cap)
        if torch.is_grad_enabled():
            return (summed_nll(rows, output, targets) * self._shrink).view(1, 1, 1)
        self._each = each_nll(rows, output, targets)
        return hidden[..., :1]

    def _check(self, out: torch.Tensor) -> None:
        if out.shape != (1, 1, 1) or out.dtype != torch.float32 or self._calls != 1:
            raise RunError(
                f"the loss came out of the model as {out.dtype} of shape {tuple(out.shape)} after {self._calls} calls of "
                "its output layer, not as one number in fp32; set train.chunked_loss=false, which makes all logits at once"
            )


def find_head(model: Any) -> Head:
    """The head of a model in fp32, proved on one small batch: its loss is that of the model's own logits.

    UnknownHeadError where it is not, or where there is none of the known kind; the model is then as before. Random numbers
    and weights are as before afterwards.
    """
    head = Head(model)
    weight = head.layer.weight
    generator = torch.Generator().manual_seed(1)
    size = PROBE[0], min(PROBE[1], max_positions(model.config) or PROBE[1])
    ids = torch.randint(weight.shape[0], size, generator=generator) % model.config.get_text_config().vocab_size
    ids = ids.to(weight.device)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            _prove(head, model, ids)
    except Exception as error:  # whatever a model says that is given another thing than it expects
        head.detach()
        raise UnknownHeadError(" ".join(str(error).split())) from error
    finally:
        model.train(was_training)
    return head


def _prove(head: Head, model: Any, ids: torch.Tensor) -> None:
    targets = next_tokens(ids)
    with torch.no_grad():
        head.find_out(model, ids)
        logits = model(input_ids=ids).logits
    wanted = next_token_nll(logits, ids)
    nll, correct = head.each(model, {"input_ids": ids}, targets)
    with torch.enable_grad():
        summed = head.summed(model, {"input_ids": ids}, targets).detach()
    same = torch.allclose(nll[:, :-1], wanted, rtol=ALLOWED, atol=ALLOWED)
    likeliest = (logits[:, :-1].argmax(-1) == ids[:, 1:]).equal(correct[:, :-1])
    if not same or not likeliest or not torch.isclose(summed, wanted.sum(), rtol=ALLOWED):
        raise UnknownHeadError(
            f"its loss by chunks is {summed.item():.7g} nats, and that of its logits {wanted.sum().item():.7g}"
        )
