"""What the loop needs of whatever holds weights, gradients and optimizer states. The loop does not know which it has."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator

from clm_dist.checkpoint.content import Tensors
from clm_dist.checkpoint.saved import Saved
from clm_dist.config import TrainConfig
from clm_dist.model.objective import Objective


class Engine(ABC):
    """A model with its optimizer, on this rank. Every rank has one and makes every call."""

    name: str  # for the screen
    objective: Objective  # what of the model is learned
    given: frozenset[str] = frozenset()  # names of weights that no checkpoint holds: every start has them, frozen
    recorded = 0  # bytes of the GPU that are in use and that no allocation counts
    sharded = False  # whether a forward pass is collective: every rank must then make as many as any other

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator = accelerator
        self.model = model  # what training calls
        self.optimizer = optimizer  # the one that holds the learning rates

    @property
    @abstractmethod
    def plain(self) -> Any:
        """The transformers model inside."""

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled (fp16): gradients then overflow now and then by design."""
        return False

    @property
    def overflowed(self) -> bool:
        """Whether the newest update was left out, because gradients were too large for the scale of the loss (fp16)."""
        return False

    def set_lr(self, lr: float) -> None:
        """Of every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Around one forward and backward. last: of its step, when gradients must have been summed over all ranks."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients. loss: (); the mean over ranks is what is differentiated."""

    def learn(
        self, inputs: Mapping[str, torch.Tensor], scored: torch.Tensor | None, weight: float | torch.Tensor
    ) -> torch.Tensor:
        """One forward and backward, within `micro_step`: adds to the gradients. Returns the summed nats of the batch, (),
        which the next call may overwrite. weight: of a nat in what is differentiated. Every rank must call this."""
        nll = self.objective.summed(self.model, inputs, scored)
        self.backward(nll * weight)
        return nll.detach()

    @abstractmethod
    def gradient_norm(self) -> torch.Tensor:
        """The norm over all gradients of the step, before clipping, (); infinite where one is no finite number. Once a
        step, before `step`. Every rank must call this."""

    @abstractmethod
    def step(self, update: bool) -> None:
        """Clips, updates the weights unless that is withheld, and forgets the gradients. Every rank must call this."""

    @property
    def guards(self) -> bool:
        """Whether there is `step_unless`."""
        return False

    def step_unless(self, bad: torch.Tensor) -> None:
        """`step`, whose update is left out where `bad`, (), is true, which nobody has to know yet. Every rank must call
        this."""
        raise NotImplementedError

    def settle(self, micro_batch_size: int, block_size: int) -> None:  # noqa: B027
        """Whatever would make the first step of a start another than the same step of a run that went on."""

    def capture(self, train: TrainConfig, micro_batch_size: int, block_size: int, accumulates: bool) -> str | None:
        """Has `learn` launched by one call where that is faster; what to say of it. After `settle`."""
        return None

    @abstractmethod
    def held(self) -> dict[str, Tensors]:
        """This rank's part of a checkpoint, by kind (model, optimizer): of every value one rank has a copy that it names.

        Weights are those that the optimizer updates (fp32). Views, not copies.
        """

    @abstractmethod
    def load(self, model: Saved, optimizer: Saved) -> None:
        """Becomes what was saved, by whatever engine and number of ranks. Every rank must call this."""

    @abstractmethod
    def full_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """All weights and saved buffers as the model computes with them, one after the other, tied ones under each name:
        on the main process, in memory of the CPU or of the model itself; elsewhere None. Every rank must call this, and
        take them all."""

    @abstractmethod
    def replicas(self) -> Tensors:
        """What every rank should hold alike."""

    def scaler_state(self) -> dict[str, Any] | None:
        """Of the loss scale, for JSON; None where there is none."""
        return None

    def load_scaler_state(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Goes on with a loss scale."""
