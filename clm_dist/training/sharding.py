"""Which engine a launch asks for, and its settings: checked before a model is loaded, and again when it is alive."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from clm_dist.config import Config
from clm_dist.engine.engine import Engine
from clm_dist.engine.make import asked
from clm_dist.errors import ConfigError, RunError
from clm_dist.planning.deepspeed_checks import Run
from clm_dist.planning.deepspeed_config import Resolved, problems_with, resolve
from clm_dist.planning.deepspeed_launch import launch_problems, launched
from clm_dist.planning.deepspeed_live import live_differences
from clm_dist.planning.shapes import hidden_size
from clm_dist.training.plan import Plan


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
        return Sharding(_without_deepspeed(config))
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
    if config.train.mixed_precision == "fp8":
        problems.append("train.mixed_precision=fp8 is not supported under DeepSpeed; set bf16, or launch with ddp.yaml")
    if problems:
        raise ConfigError(problems)
    return Sharding("zero", resolve(found.values, found.source, config, **sizes, device=device))


def check_live(wanted: Sharding, engine: Engine, config: Config) -> None:
    """RunError unless a live DeepSpeed engine holds what was resolved. Before a step changes the learning rate."""
    if wanted.settings is not None:
        different = live_differences(wanted.settings, engine.model, config.optim)
        if different:
            raise RunError("\n".join(different))


def _without_deepspeed(config: Config) -> str:
    kind = asked(os.environ)
    precision = config.train.mixed_precision
    if kind == "fsdp2":
        problems = []
        if os.environ.get("FSDP_VERSION", "1") != "2":
            problems.append(
                f"the launcher asks for FSDP version {os.environ.get('FSDP_VERSION', '1')}, which is not supported; set "
                "fsdp_version: 2, or launch with accelerate_configs/fsdp2.yaml"
            )
        if precision in ("fp16", "fp8"):
            problems.append(f"train.mixed_precision={precision} is not supported under FSDP2; set bf16 or no")
        if "WORLD_SIZE" not in os.environ:
            problems.append("FSDP2 needs several processes, and one was started; set --num_processes 2 or more")
        if problems:
            raise ConfigError(problems)
    return kind
