"""Where parts of parameters lie in the flat fp32 partitions of a rank, under DeepSpeed's ZeRO.

Read from DeepSpeed's own books: at stages 1 and 2 the mapping that its universal checkpoint uses (`_hp_mapping`), at stage 3
`grad_position`. With it shards are saved by parameter and range, which any other number of ranks, or DDP, can read.
"""

from dataclasses import dataclass
from typing import Any

import torch

from clm_dist.checkpoint.content import Tensors
from clm_dist.checkpoint.saved import SEPARATOR, Saved
from clm_dist.errors import RunError


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a flattened parameter: `numel` of `flat`, from `offset` on."""

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    @property
    def stop(self) -> int:
        return self.start + self.numel

    def key(self, kind: str = "") -> str:
        """Its name in a checkpoint."""
        return f"{kind}{self.name}{SEPARATOR}{self.start}"

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its elements of something that is laid out like `self.flat`: weights or moments, (numel,). A view."""
        return flat.detach().narrow(0, self.offset, self.numel)


def optimized(engine: Any) -> list[str]:
    """The names of all parameters that the optimizer updates, on whatever rank they lie."""
    names = _names(engine)
    zero = engine.optimizer
    groups = zero.bit16_groups if engine.zero_optimization_stage() < 3 else zero.fp16_groups
    return [names[parameter] for group in groups for parameter in group]


def flats(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 partitions: what the optimizer updates."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        return list(zero.single_partition_of_fp32_groups)
    return list(zero.fp32_partitioned_groups_flat)


def fragments(engine: Any) -> list[Fragment]:
    """All that this rank holds, in the order of the partitions."""
    names, zero, held = _names(engine), engine.optimizer, flats(engine)
    found = []
    if engine.zero_optimization_stage() < 3:
        for flat, group in zip(held, zero.bit16_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
                    found.append(Fragment(names[parameter], lp.start, lp.numel, flat, hp.start))
        return found
    for flat, group in zip(held, zero.fp16_groups, strict=True):
        for parameter in group:
            _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * size  # the last ranks' shares end in padding
            if (numel := min(size, parameter.ds_numel - start)) > 0:
                found.append(Fragment(names[parameter], start, numel, flat, offset))
    return found


def frozen(engine: Any) -> list[Fragment]:
    """What this rank holds of parameters that stage 3 shards and nobody updates; at other stages every rank has them."""
    names, zero = _names(engine), engine.optimizer
    if engine.zero_optimization_stage() < 3:
        return []
    found = []
    for parameter in set(names) - {one for group in zero.fp16_groups for one in group}:
        flat = parameter.ds_tensor.view(-1)
        start = zero._get_param_partition_rank(parameter) * flat.numel()
        if (numel := min(flat.numel(), parameter.ds_numel - start)) > 0:
            found.append(Fragment(names[parameter], start, numel, flat, 0))
    return found


def optimizer_state(optimizer: torch.optim.Optimizer, mine: list[Fragment]) -> Tensors:
    """What the optimizer remembers of this rank's fragments. Numbers (of steps) once, by who holds the first element."""
    held: Tensors = {}
    for fragment in mine:
        for key, value in optimizer.state.get(fragment.flat, {}).items():
            if torch.is_tensor(value) and value.shape == fragment.flat.shape:
                held[fragment.key(f"{key}.")] = fragment.of(value)
            elif fragment.start == 0:
                held[f"{key}.{fragment.name}"] = torch.as_tensor(value)
    return held


def load_optimizer(
    optimizer: torch.optim.Optimizer, mine: list[Fragment], held: list[torch.Tensor], saved: Saved
) -> None:
    """Gives the optimizer back what was remembered of these fragments.

    A partition has one number of steps where its parameters had one each: they must agree.
    """
    kinds: dict[str, list[str]] = {}  # of memory: the parameters that have it
    for name in saved.names():
        kind, _, parameter = name.partition(".")
        kinds.setdefault(kind, []).append(parameter)
    optimizer.state.clear()
    for kind, parameters in kinds.items():
        has = set(parameters)
        if all(saved.numel(f"{kind}.{name}") == 1 for name in parameters) and kind == "step":
            counts = {saved.read(f"{kind}.{name}", 0, 1).item() for name in parameters}
            if len(counts) > 1:
                raise RunError(f"parameters were updated {sorted(counts)} times; ZeRO keeps one count for all of them")
            for flat in held:
                optimizer.state[flat][kind] = torch.tensor(counts.copy().pop(), device=flat.device)
            continue
        for flat in held:
            memory = torch.zeros_like(flat)
            for fragment in mine:
                if fragment.flat is flat and fragment.name in has:
                    fragment.of(memory).copy_(saved.read(f"{kind}.{fragment.name}", fragment.start, fragment.stop))
            optimizer.state[flat][kind] = memory


def _names(engine: Any) -> dict[Any, str]:
    return {parameter: name for name, parameter in engine.module.named_parameters()}
