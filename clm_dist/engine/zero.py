"""Ranks share gradients and optimizer states, at stage 3 weights too: ZeRO (Rajbhandari et al., arXiv:1910.02054).

DeepSpeed's engine is driven by its own calls rather than through Accelerate's wrapper, which updates the weights inside
`backward`, before anybody could look at the gradients, and whose `clip_grad_norm_` clips nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from clm_dist.checkpoint import content
from clm_dist.checkpoint.content import Tensors
from clm_dist.checkpoint.saved import Saved
from clm_dist.engine.engine import Engine
from clm_dist.engine.fragments import Fragment, flats, fragments, frozen, load_optimizer, optimized, optimizer_state


class Zero(Engine):
    """DeepSpeed's ZeRO of any stage, with or without offload."""

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        engine, _ = accelerator.prepare(model, optimizer)
        self.zero = engine.optimizer  # DeepSpeed's, which owns the partitions
        super().__init__(accelerator, engine, self.zero.optimizer)
        self.stage: int = engine.zero_optimization_stage()
        self.sharded = self.stage == 3
        self.name = f"ZeRO-{self.stage}"

    @property
    def plain(self) -> Any:
        return self.model.module

    @property
    def scales(self) -> bool:
        return bool(self.model.fp16_enabled())  # type: ignore[operator]

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # by default it would divide by the accumulation steps, whatever the tokens in each
        self.model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def gradient_norm(self) -> torch.Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self.zero
        norm = zero.scaled_global_norm() if self.stage < 3 else combine_grad_norm_groups(zero._get_norm_groups())
        norm = torch.as_tensor(norm, device=self.accelerator.device) / zero.loss_scale
        return torch.where(norm >= 0, norm, float("inf"))  # DeepSpeed says -1 where one is not finite

    def step(self, update: bool) -> None:
        """DeepSpeed clips, updates, spreads the weights and forgets the gradients; of a step that is withheld all but the
        update itself."""
        if update:
            self.model.step()  # type: ignore[operator]
            return
        self.zero._optimizer_step = lambda group: None  # on the object, in front of the class's own
        try:
            self.model.step()  # type: ignore[operator]
        finally:
            del self.zero._optimizer_step

    def held(self) -> dict[str, Tensors]:
        mine = fragments(self.model)
        held = {fragment.key(): fragment.of(fragment.flat) for fragment in (*mine, *self._frozen())}
        held |= content.share(self._rest(), self.accelerator.process_index, self.accelerator.num_processes)
        return {"model": held, "optimizer": optimizer_state(self.optimizer, mine)}

    def load(self, model: Saved, optimizer: Saved) -> None:
        mine, rest = fragments(self.model), self._rest()
        parameters = {name: one for name, one in self.plain.named_parameters() if name not in self.given}
        content.check_names("weights", {*parameters, *rest}, model.names())
        for name, parameter in parameters.items():
            model.check_shape(name, getattr(parameter, "ds_shape", parameter.shape))
        for fragment in (*mine, *self._frozen()):
            fragment.of(fragment.flat).copy_(model.read(fragment.name, fragment.start, fragment.stop))
        for name, tensor in rest.items():
            tensor.data.copy_(model.whole(name, tensor.shape))
        load_optimizer(self.optimizer, mine, flats(self.model), optimizer)
        self._spread()

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """At stage 3 one parameter at a time is whole on a rank; only the main process keeps it."""
        from deepspeed import zero

        main = self.accelerator.is_main_process
        if self.sharded:
            self.zero._partition_all_parameters()  # some may be on their way, for a forward pass that does not come
        seen: dict[int, torch.Tensor | None] = {}  # tied weights have several names
        for name, value in self.plain.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                shared = self.sharded and isinstance(value, torch.nn.Parameter)
                with zero.GatheredParameters([value]) if shared else nullcontext():
                    seen[id(value)] = value.detach().to("cpu", copy=True) if main else None
            yield name, seen[id(value)]
        self._gather_persistent()

    def replicas(self) -> Tensors:
        return {} if self.sharded else dict(self.plain.named_parameters())

    def scaler_state(self) -> dict[str, Any] | None:
        if not self.scales:
            return None
        scaler = self.zero.loss_scaler
        if not scaler.dynamic:
            return {"scale": float(scaler.cur_scale), "good_steps": 0}
        good = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": float(scaler.cur_scale), "good_steps": good, "hysteresis": scaler.cur_hysteresis}

    def load_scaler_state(self, saved: dict[str, Any]) -> None:
        if self.scales and self.zero.loss_scaler.dynamic:  # else it is a number of the configuration's
            scaler = self.zero.loss_scaler
            scaler.cur_scale = saved["scale"]
            scaler.cur_iter, scaler.last_overflow_iter = saved["good_steps"], -1  # it asks for their difference only
            scaler.cur_hysteresis = saved.get("hysteresis", scaler.delayed_shift)

    @property
    def overflowed(self) -> bool:
        return self.scales and bool(self.zero.overflow)

    def _frozen(self) -> list[Fragment]:
        return [fragment for fragment in frozen(self.model) if fragment.name not in self.given]

    def _rest(self) -> Tensors:
        """What every rank holds whole: saved buffers, and below stage 3 weights that the optimizer does not update."""
        shared = {name for name, _ in self.plain.named_parameters()} if self.sharded else set(optimized(self.model))
        return {name: tensor for name, tensor in content.weights(self.plain, self.given).items() if name not in shared}

    def _spread(self) -> None:
        """The weights that the model computes with become those of the optimizer, on every rank."""
        zero = self.zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Small parameters that stage 3 keeps whole between steps are whole again."""
        if self.sharded and self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
