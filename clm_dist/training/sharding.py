"""Which engine a launch asks for, and its settings: checked before a model is loaded, and again when it is alive."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from clm_dist.config import Config
from clm_dist.engine.engine import Engine
from clm_dist.errors import ConfigError, RunError
from clm_dist.model.configuration import idle_experts
from clm_dist.planning.deepspeed_checks import Run
from clm_dist.planning.deepspeed_config import Resolved, problems_with, resolve
from clm_dist.planning.deepspeed_launch import launch_problems, launched
from clm_dist.planning.deepspeed_live import live_differences, optimizer_differences
from clm_dist.planning.shapes import hidden_size
from clm_dist.training.launch import asked
from clm_dist.training.plan import Plan

_NEITHER = "a run's weights and states stay on its device"
# What an FSDP section can ask for that nobody does here: harmless values, and why not another.
FSDP_FIELDS = {
    "FSDP_OFFLOAD_PARAMS": (("false",), f"{_NEITHER}: launch with zero3_offload.yaml to use the memory of the CPU"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "train.activation_checkpointing owns it"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), _NEITHER),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard"), "weights are always sharded again after the forward pass"),
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "everything is sharded over all processes"),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "the model's own blocks are what is gathered at a time"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (("",), "transformers says which its blocks are"),
    "FSDP_IGNORED_MODULES": (("", "none"), "everything is sharded"),
}


@dataclass(frozen=True)
class Sharding:
    """What the processes were started for."""

    kind: str  # replicated, zero, fsdp2
    deepspeed: Resolved | None = None

    @property
    def settings(self) -> dict[str, Any] | None:
        """What DeepSpeed is given: no "auto" in it."""
        return None if self.deepspeed is None else self.deepspeed.values

    def lines(self) -> list[str]:
        """What every "auto" became."""
        return [] if self.deepspeed is None else [f"{self.deepspeed.source}: {line}" for line in self.deepspeed.lines]


def sharding(config: Config, plan: Plan, model_configuration: Any) -> Sharding:
    """What this launch asks for; a ConfigError with everything that is wrong with it."""
    found = launched(os.environ)
    if found is None:
        return Sharding(_without_deepspeed(config, model_configuration))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, Any] = {
        "world_size": plan.world_size,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "hidden_size": hidden_size(model_configuration),
    }
    problems = launch_problems(
        os.environ, found, config, world_size=plan.world_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps, device=device,
    )  # fmt: skip
    run = Run(config, **sizes, device=device)
    problems += [f"{found.source}: {problem}" for problem in problems_with(found.values, run)]
    problems += _about_experts(config, model_configuration)
    if config.train.compile == "on":
        problems.append(
            "train.compile=on is not supported under DeepSpeed, whose hooks stand within the blocks; set auto"
        )
    if config.train.mixed_precision == "fp8":
        problems.append("train.mixed_precision=fp8 is not supported under DeepSpeed; set bf16, or launch with ddp.yaml")
    if problems:
        raise ConfigError(problems)
    return Sharding("zero", resolve(found.values, found.source, config, **sizes, device=device))


def check_live(wanted: Sharding, engine: Engine, config: Config) -> None:
    """RunError unless the live optimizer holds what the recipe says, and DeepSpeed what was resolved. Before a step changes
    the learning rate."""
    different = optimizer_differences(engine.optimizer.param_groups, config.optim)
    if wanted.settings is not None:
        different += live_differences(wanted.settings, engine.model)
    if different:
        raise RunError("\n".join(different))


def _about_experts(config: Config, model_configuration: Any) -> list[str]:
    """What is wrong with sharding a model of which some gradients may not be there."""
    if not idle_experts(model_configuration):
        return []
    return [
        f"{config.model.called} has experts that are modules of their own in transformers 4.57: one without a token on a "
        "process has no gradient there, and sharded gradients would be summed with those of another; launch with "
        "accelerate_configs/ddp.yaml, or take transformers 5"
    ]


def _without_deepspeed(config: Config, model_configuration: Any) -> str:
    kind = asked(os.environ)
    precision = config.train.mixed_precision
    if kind == "fsdp2":
        problems = _about_experts(config, model_configuration)
        if os.environ.get("FSDP_VERSION", "1") != "2":
            problems.append(
                f"the launcher asks for FSDP version {os.environ.get('FSDP_VERSION', '1')}, which is not supported; set "
                "fsdp_version: 2, or launch with accelerate_configs/fsdp2.yaml"
            )
        if precision in ("fp16", "fp8"):
            problems.append(f"train.mixed_precision={precision} is not supported under FSDP2; set bf16 or no")
        if "WORLD_SIZE" not in os.environ:
            problems.append("FSDP2 needs a launcher, for one process too; start it by accelerate launch or torchrun")
        problems += [
            f"the accelerate configuration says {variable.lower()}={given}, and {why}; leave it out"
            for variable, (harmless, why) in FSDP_FIELDS.items()
            if (given := os.environ.get(variable, harmless[0])).lower() not in harmless
        ]
        if problems:
            raise ConfigError(problems)
    return kind
