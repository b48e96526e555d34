"""A DeepSpeed configuration resolved from the recipe: no "auto" left, or every reason why not. Pure.

What Accelerate and DeepSpeed would put for "auto", or for a key that is not there, is not what a recipe says: clipping at
1.0, the smaller micro-batch of training and evaluation, no gathering on save. So nothing is left to them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clm_dist.config import Config
from clm_dist.errors import ConfigError
from clm_dist.planning.deepspeed_checks import (
    ZERO,
    Run,
    at,
    of_the_device,
    of_the_recipe,
    of_the_stage,
    shown,
    understood,
)

GATHER = f"{ZERO}.stage3_gather_16bit_weights_on_model_save"
# Elements, for a model of width h: as Accelerate has them (Accelerator._prepare_deepspeed).
WIDTHS: dict[str, tuple[Callable[[int], int], str]] = {
    f"{ZERO}.reduce_bucket_size": (lambda h: h * h, "hidden size {h} squared"),
    f"{ZERO}.stage3_prefetch_bucket_size": (lambda h: int(0.9 * h * h), "0.9 x hidden size {h} squared"),
    f"{ZERO}.stage3_param_persistence_threshold": (lambda h: 10 * h, "10 x hidden size {h}"),
}


@dataclass(frozen=True)
class Resolved:
    """What `deepspeed.initialize` is given, and a line for each value that the file left open."""

    source: str
    values: dict[str, Any]
    lines: tuple[str, ...]

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return int(self.values[ZERO]["stage"])

    @property
    def offloads(self) -> bool:
        """Whether optimizer states or parameters live outside the GPU."""
        return "offload_optimizer" in self.values[ZERO] or "offload_param" in self.values[ZERO]


def resolve(
    values: dict[str, Any],
    source: str,
    config: Config,
    *,
    world_size: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    hidden_size: int | None,
    device: str = "cpu",
) -> Resolved:
    """`values` with every number of the recipe in its place; `source` names them in messages.

    A ConfigError has all problems at once. `hidden_size` is the model's width, None where it tells none.
    stage3_gather_16bit_weights_on_model_save becomes true at stage 3: an export of ours gathers one parameter at a
    time and does not read it, but anything that calls Accelerate's get_state_dict would raise without it.
    """
    run = Run(config, world_size, micro_batch_size, gradient_accumulation_steps, hidden_size, device)
    problems = problems_with(values, run)
    if problems:
        raise ConfigError(f"{source}: {problem}" for problem in problems)
    return _fill(understood(values)[0], source, run)


def problems_with(values: dict[str, Any], run: Run) -> list[str]:
    """Everything that is wrong with a configuration for a run, without the name of the file."""
    sound, problems = understood(values)
    misread = {problem.split("=")[0] for problem in problems}  # said already, and not once more as missing
    if not misread & {ZERO, f"{ZERO}.stage"}:
        problems += of_the_stage(sound)
    return [*problems, *of_the_recipe(sound, run), *of_the_device(sound, run)]


def _fill(sound: dict[str, Any], source: str, run: Run) -> Resolved:
    """Sound values, completed."""
    values, lines = copy.deepcopy(sound), []

    def put(path: str, value: Any, origin: str) -> None:
        if at(values, path) in (None, "auto"):
            section = values
            *sections, key = path.split(".")
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
            lines.append(f"{path} = {shown(value)} ({origin})")

    for path, (value, origin) in run.owned().items():
        put(path, value, origin)
    precision = run.config.train.mixed_precision
    if precision in ("bf16", "fp16"):
        # left alone, micro-steps and processes would be added up in 16 bits; at stage 1 fp32 sums of micro-steps would bring
        # in another optimizer of DeepSpeed's (BF16_Optimizer), which keeps whole gradients in fp32 as well
        if at(values, f"{ZERO}.stage") == 1:
            put("data_types.grad_accum_dtype", precision, "all that stage 1 has; zero2 adds micro-steps up in fp32")
        else:
            put("data_types.grad_accum_dtype", "fp32", "sums are fp32")
        put("communication_data_type", "fp32", "sums are fp32")
    zero = values[ZERO]
    for path, (size, words) in WIDTHS.items():
        if run.hidden_size is not None and at(values, path) == "auto":
            put(path, size(run.hidden_size), words.format(h=run.hidden_size))
    if zero["stage"] == 3:
        put(GATHER, True, "an export holds whole weights")
    for name in ("offload_optimizer", "offload_param"):
        if at(zero, f"{name}.device") in (None, "none"):
            zero.pop(name, None)  # says the same, and everybody who asks need not look twice
        elif at(zero, f"{name}.nvme_path") == "none":
            zero[name].pop("nvme_path")
    put("zero_allow_untested_optimizer", True, "torch's AdamW")
    put("zero_force_ds_cpu_optimizer", False, "torch's AdamW, also where states are offloaded: nothing is compiled")
    return Resolved(source, values, tuple(lines))
