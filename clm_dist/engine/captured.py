"""The forward and backward pass of a micro-step as CUDA graphs: all that it launches goes to the GPU by one call.

A small model launches hundreds of kernels that each take microseconds, and Python takes longer to launch them than a GPU to
run them (docs/performance.md). Recorded once and replayed, they are the same kernels in the same order on the same numbers:
the same bits. What is recorded must not wait for the GPU, and reads and writes the same memory every time: batches are
copied into it, and gradients lie in it.

Legend: B micro_batch_size, T block_size.
"""

import time
import warnings
from collections.abc import Callable, Iterable

import torch

from clm_dist.config import TrainConfig

# inputs (B, T), scored (B, T - 1), weight () -> summed nats (), having added to the gradients
Learn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# what to record, the memory to share with other recordings -> what it returned, and what runs it again
Record = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]

WAITED = "called a synchronizing CUDA operation"  # so torch says
BUSY = 0.5  # share of a micro-step that the CPU takes to launch it, from which on a recording pays


class NotCapturedError(Exception):
    """Why a micro-step is launched kernel by kernel."""


def why_not(train: TrainConfig, alone: bool, precision: str) -> str | None:
    """Why a recipe's micro-steps are not recorded, whatever the model; None where they may be. alone: no gradients are
    exchanged during the backward pass."""
    if not alone:
        return "gradients are exchanged during the backward pass"
    if precision not in ("no", "bf16"):
        return f"train.mixed_precision={precision} changes the scale of the loss on the way"
    if train.activation_checkpointing:
        return "train.activation_checkpointing computes parts again, with random numbers put back"
    if train.isolate_documents:
        return "train.isolate_documents looks at each batch for its documents"
    return None


class Captured:
    """A micro-step of B x T tokens. learn: one that is launched kernel by kernel; its gradients are forgotten beforehand."""

    def __init__(
        self,
        learn: Learn,
        parameters: Iterable[torch.nn.Parameter],
        shape: tuple[int, int],
        device: torch.device,
        accumulates: bool,
        record: Record | None = None,
    ) -> None:
        self._learn = learn
        self._parameters = [one for one in parameters if one.requires_grad]
        self._ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._scored = torch.ones(shape[0], shape[1] - 1, dtype=torch.bool, device=device)
        self._weight = torch.ones((), device=device)
        record = record or self._recorder()
        before = _kept()
        try:
            self._first = record(self._once)
            self._gradients = [one.grad for one in self._parameters]
            # another recording, since it adds to gradients where the first of a step makes them
            self._further = record(self._once) if accumulates else None
        finally:
            self._forget()
        self.held = _kept() - before  # bytes to compute in: nobody else gets them, and no allocation counts them

    def __call__(self, input_ids: torch.Tensor, scored: torch.Tensor | None, weight: float) -> torch.Tensor:
        """Summed nats of a batch, (), overwritten by the next call; adds to the gradients, or makes them where there are
        none. scored: None: all."""
        self._ids.copy_(input_ids)
        if scored is None:
            self._scored.fill_(True)
        else:
            self._scored.copy_(scored)
        self._weight.fill_(weight)
        if all(one.grad is None for one in self._parameters):
            nll, again = self._first
            again()
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        else:
            assert self._further is not None  # a step of one micro-step begins without gradients
            nll, again = self._further
            again()
        return nll

    def _once(self) -> torch.Tensor:
        return self._learn(self._ids, self._scored, self._weight)

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _recorder(self) -> Record:
        """Records CUDA graphs in one pool of memory, having tried the micro-step. NotCapturedError where it cannot, or
        would not pay."""
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._try()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # what the trial used is not the pool's

        def record(what: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    nll = what()
            except RuntimeError as error:
                raise NotCapturedError(" ".join(str(error).split())[:200]) from error
            return nll, graph.replay

        return record

    def _try(self) -> None:
        """Compiles what is compiled, looks whether anything waits for the GPU, and whether the GPU waits for the CPU."""
        for mode in ("default", "error", "default"):
            torch.cuda.synchronize()
            with warnings.catch_warnings():  # that the mode is a prototype which does not see everything
                warnings.filterwarnings("ignore", message="Synchronization debug mode")
                torch.cuda.set_sync_debug_mode(mode)
            began = time.perf_counter()
            try:
                self._once()
            except RuntimeError as error:
                if WAITED not in str(error):
                    raise
                raise NotCapturedError("the model looks at its own numbers") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
                self._forget()
            launched = time.perf_counter() - began
        torch.cuda.synchronize()
        if launched < BUSY * (time.perf_counter() - began):
            raise NotCapturedError("the GPU has enough to do with what the CPU launches")


def _kept() -> int:
    """Bytes of the GPU that torch keeps without holding anything in them."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
