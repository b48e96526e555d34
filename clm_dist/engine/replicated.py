"""Every rank holds all of it: DistributedDataParallel (Li et al., arXiv:2006.15704), or one process."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from clm_dist.checkpoint import content
from clm_dist.checkpoint.content import Tensors
from clm_dist.checkpoint.saved import Saved
from clm_dist.config import TrainConfig
from clm_dist.engine.captured import Captured, NotCapturedError, why_not
from clm_dist.engine.engine import Engine
from clm_dist.errors import UserError


class Replicated(Engine):
    """By Accelerate's own means."""

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
    ) -> None:
        prepared, self._stepper = accelerator.prepare(model, optimizer)
        super().__init__(accelerator, prepared, self._stepper.optimizer)
        if accelerator.mixed_precision == "fp8" and not _fp8_layers(prepared):
            raise UserError(
                f"train.mixed_precision=fp8: {type(self.plain).__name__} has no layer that computes in fp8 (torchao and "
                "Transformer Engine replace torch.nn.Linear alone); set train.mixed_precision=bf16, which this would be"
            )
        self._max_norm = max_norm or float("inf")
        self.name = "DDP" if accelerator.num_processes > 1 else "one process"
        self._parameters = list(prepared.parameters())  # walking over all modules takes longer than clipping
        self._captured: Captured | None = None

    @property
    def plain(self) -> Any:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def scales(self) -> bool:
        return self.accelerator.scaler is not None

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        # ranks exchange gradients in the last one only; before it each sums its own
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def learn(
        self, inputs: Mapping[str, torch.Tensor], scored: torch.Tensor | None, weight: float | torch.Tensor
    ) -> torch.Tensor:
        if self._captured is None:
            return super().learn(inputs, scored, weight)
        return self._captured(inputs["input_ids"], scored, float(weight))

    def gradient_norm(self) -> torch.Tensor:
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(self._parameters, self._max_norm)
        return norm

    def step(self, update: bool) -> None:
        scaler = self.accelerator.scaler
        if update:
            self._stepper.step()
        elif scaler is not None:
            scaler.update(scaler.get_scale())  # the scale stays; that gradients were unscaled is forgotten
        self._stepper.zero_grad()

    @property
    def guards(self) -> bool:
        return not self.scales

    def step_unless(self, bad: torch.Tensor) -> None:
        # what a gradient scaler gives the fused kernel, which then leaves weights, moments and their count as they are
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        try:
            self._stepper.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        self._stepper.zero_grad()

    @property
    def overflowed(self) -> bool:
        return self.scales and bool(self._stepper.step_was_skipped)

    def settle(self, micro_batch_size: int, block_size: int) -> None:
        """One pass whose gradients are thrown away, before the first step of every start.

        DDP exchanges gradients in buckets, and after its first backward pass makes them anew, in the order in which
        gradients came (`Reducer::rebuild_buckets`). Where a value lies in a bucket decides in which order three or more
        ranks add it up: without this the first step after a resume would round otherwise than in a run that went on.
        """
        if isinstance(self.model, DistributedDataParallel):
            self.model.train()
            ids = torch.zeros(micro_batch_size, block_size, dtype=torch.int64, device=self.accelerator.device)
            self.objective.summed(self.model, {"input_ids": ids}).backward()
            self.model.zero_grad()

    def capture(self, train: TrainConfig, micro_batch_size: int, block_size: int, accumulates: bool) -> str | None:
        accelerator = self.accelerator
        if train.cuda_graph == "off" or accelerator.device.type != "cuda":
            return None
        alone = not isinstance(self.model, DistributedDataParallel)
        why = why_not(train, alone, accelerator.mixed_precision)
        if why is None:
            self.model.train()
            shape = micro_batch_size, block_size
            try:
                self._captured = Captured(self._launch, self._parameters, shape, accelerator.device, accumulates)
                self.recorded = self._captured.held
                torch.cuda.reset_peak_memory_stats()  # what it took to record is counted by `recorded` from here on
            except NotCapturedError as error:
                why = str(error)
        return "a micro-step is one CUDA graph" if why is None else f"train.cuda_graph=auto is off: {why}"

    def _launch(self, ids: torch.Tensor, scored: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().learn({"input_ids": ids}, scored, weight)

    def held(self) -> dict[str, Tensors]:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        everything = {
            "model": content.weights(self.plain, self.given),
            "optimizer": content.optimizer_state(self.plain, self.optimizer),
        }
        return {kind: content.share(tensors, rank, world_size) for kind, tensors in everything.items()}

    def load(self, model: Saved, optimizer: Saved) -> None:
        content.load_weights(self.plain, model, self.given)
        content.load_optimizer(self.plain, self.optimizer, optimizer)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, tensor in self.plain.state_dict().items():
            yield name, tensor if self.accelerator.is_main_process else None

    def replicas(self) -> Tensors:
        return dict(self.plain.named_parameters())

    def scaler_state(self) -> dict[str, Any] | None:
        scaler = self.accelerator.scaler
        return None if scaler is None else {"scale": scaler.get_scale(), "good_steps": scaler._get_growth_tracker()}

    def load_scaler_state(self, saved: dict[str, Any]) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None:
            state = {"scale": saved["scale"], "_growth_tracker": saved["good_steps"]}
            scaler.load_state_dict({**scaler.state_dict(), **state})


def _fp8_layers(model: torch.nn.Module) -> int:
    """How many layers Accelerate has replaced: GPT-2's own Conv1D is none that it knows, and it says nothing of that.

    Norms do not count: Transformer Engine's take the place of torch's, and compute in the precision of their input.
    """
    makers = ("torchao", "transformer_engine")
    kinds = [type(module) for module in model.modules()]
    return sum(kind.__module__.partition(".")[0] in makers and "Linear" in kind.__name__ for kind in kinds)
