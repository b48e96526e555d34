"""The same steps in plain torch: one process, no engine, fp32, written apart from the loop, to be compared with it.

Legend: B sequences, T = block_size, V = vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clm_dist.config import Config
from clm_dist.data.order import blocks_at, micro_batches, step_seed
from clm_dist.ledger.ledger import digest_of
from clm_dist.training.batches import Batch, Batches
from clm_dist.training.plan import Plan
from clm_dist.training.schedule import lr_at


@dataclass(frozen=True)
class Step:
    """What one optimizer update was made of."""

    digest: int  # check sum of the blocks read
    lr: float
    loss: float  # nats per token
    grad_norm: float  # before clipping


class Reference:
    """A model trained by the book."""

    def __init__(self, config: Config, plan: Plan, model: Any, batches: Batches) -> None:
        self.config, self.plan, self.batches = config, plan, batches
        self.model = model.to(batches.device).train()
        self.start = {name: one.detach().clone() for name, one in model.named_parameters()}
        optim = config.optim
        decayed, plain = ([p for p in model.parameters() if (p.ndim >= 2) == many] for many in (True, False))
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        betas = (optim.beta1, optim.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, foreach=False)

    def step(self, number: int) -> Step:
        """Update `number` (from 0): all micro-batches of all ranks, one after the other."""
        plan, seed, optim = self.plan, self.config.seed, self.config.optim
        size = plan.global_batch_size
        blocks = blocks_at(number * size, size, plan.num_blocks, seed)
        nll, tokens = torch.zeros((), dtype=torch.float64, device=self.batches.device), 0
        for rank in range(plan.world_size):
            for i, indices in enumerate(micro_batches(blocks, rank, plan.world_size, plan.micro_batch_size)):
                batch = self.batches.batch(indices)
                torch.manual_seed(step_seed(seed, number, i * plan.world_size + rank))  # dropout as the rank has it
                one, count = _nll(self.model(**batch.inputs()).logits, batch)
                one.backward()
                nll, tokens = nll + one.detach().double(), tokens + count
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient /= tokens
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
        if optim.max_grad_norm is not None and norm > optim.max_grad_norm:
            for gradient in gradients:
                gradient *= optim.max_grad_norm / norm
        lr = lr_at(number, plan.max_steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(digest_of(blocks), lr, nll.item() / tokens, norm)

    def weights(self) -> dict[str, torch.Tensor]:
        """After the newest update, by name."""
        return {name: one.detach() for name, one in self.model.named_parameters()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's first moment, by name: the clipped gradients, averaged over steps."""
        state = self.optimizer.state
        return {name: state[one]["exp_avg"] for name, one in self.model.named_parameters() if one in state}


def _nll(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed nats of the scored tokens, and their number. logits: (B, T, V)."""
    predictions, targets = logits[:, :-1].float().reshape(-1, logits.shape[-1]), batch.input_ids[:, 1:].reshape(-1)
    if batch.scored is not None:
        counts = batch.scored.reshape(-1)
        predictions, targets = predictions[counts], targets[counts]
    return F.cross_entropy(predictions, targets, reduction="sum"), targets.numel()
