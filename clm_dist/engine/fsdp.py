"""Ranks share weights, gradients and optimizer states by torch's own means: FSDP2 (`fully_shard`, torch.distributed.fsdp).

Accelerate would refuse it on a CPU and shard by a policy of its own; the call is one line, and the same on every device.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from clm_dist.checkpoint import content
from clm_dist.checkpoint.content import Tensors
from clm_dist.checkpoint.saved import SEPARATOR, Saved
from clm_dist.engine.engine import Engine


class Fsdp(Engine):
    """Weights are kept in fp32, each rank its rows of every tensor; they are gathered block by block, in bf16 if asked."""

    sharded = True
    name = "FSDP2"

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
    ) -> None:
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        groups = [{id(one) for one in group["params"]} for group in optimizer.param_groups]
        members = {name: next(i for i, group in enumerate(groups) if id(one) in group) for name, one in _trained(model)}
        shard(model.to(accelerator.device), self.mesh, accelerator.mixed_precision)
        for number, group in enumerate(optimizer.param_groups):  # every parameter is another object now
            group["params"] = [one for name, one in _trained(model) if members[name] == number]
        super().__init__(accelerator, model, optimizer)
        self._max_norm = max_norm or float("inf")

    @property
    def plain(self) -> Any:
        return self.model

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def gradient_norm(self) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, update: bool) -> None:
        if update:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> dict[str, Tensors]:
        mine, others = self._mine()
        names: dict[Any, str] = {one: name for name, one in self.model.named_parameters()}
        states: Tensors = {}
        for one, values in self.optimizer.state.items():
            key, start = names[one], mine[names[one]][1]
            for kind, value in values.items():
                if isinstance(value, DTensor):
                    states[f"{kind}.{key}{SEPARATOR}{start}"] = value.to_local().reshape(-1)
                elif start == 0:
                    states[f"{kind}.{key}"] = torch.as_tensor(value)
        held = {f"{name}{SEPARATOR}{start}": one.reshape(-1) for name, (one, start) in mine.items() if one.numel()}
        held |= content.share(others, self.accelerator.process_index, self.accelerator.num_processes)
        return {"model": held, "optimizer": {key: value for key, value in states.items() if value.numel()}}

    def load(self, model: Saved, optimizer: Saved) -> None:
        mine, others = self._mine()
        content.check_names("weights", {*mine, *others}, model.names())
        parameters: dict[str, Any] = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for name, (local, start) in mine.items():
            model.check_shape(name, parameters[name].shape)
            if local.numel():
                local.copy_(model.read(name, start, start + local.numel()).view(local.shape))
        for name, tensor in others.items():
            tensor.copy_(model.whole(name, tensor.shape))
        for full_name in sorted(optimizer.names()):
            kind, _, name = full_name.partition(".")
            one, (local, start) = parameters[name], mine[name]
            if kind == "step":
                self.optimizer.state[one][kind] = optimizer.read(full_name, 0, 1).view(()).to(local.device)
                continue
            memory = torch.zeros_like(local)
            if local.numel():
                memory.copy_(optimizer.read(full_name, start, start + local.numel()).view(local.shape))
            self.optimizer.state[one][kind] = DTensor.from_local(
                memory, self.mesh, one.placements, run_check=False, shape=one.shape, stride=one.stride()
            )

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """One parameter at a time is whole on a rank; only the main process keeps it."""
        seen: dict[int, torch.Tensor | None] = {}  # tied weights have several names
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                seen[id(value)] = whole.detach().to("cpu", copy=True) if self.accelerator.is_main_process else None
            yield name, seen[id(value)]

    def replicas(self) -> Tensors:
        return {}

    def _mine(self) -> tuple[dict[str, tuple[torch.Tensor, int]], Tensors]:
        """This rank's rows of each parameter with their first element's place in the flattened whole; and what is not
        sharded."""
        mine, others = {}, {}
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        for name, tensor in content.weights(self.model, self.given).items():
            if isinstance(tensor, DTensor):
                rows = -(-tensor.shape[0] // ranks)  # as torch.chunk cuts: the last ranks may have none
                start = min(rank * rows, tensor.shape[0]) * math.prod(tensor.shape[1:])
                mine[name] = tensor.to_local().detach(), start
            else:
                others[name] = tensor.detach()
        return mine, others


def shard(model: Any, mesh: Any, mixed_precision: str) -> None:
    """Every block by itself, so that one at a time is whole; then what is left. In place."""
    low = torch.bfloat16 if mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    blocks = set(
        getattr(model, "_no_split_modules", None) or ()
    )  # the names of block classes, of every transformers model
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, one) for name, one in model.named_parameters() if one.requires_grad]
