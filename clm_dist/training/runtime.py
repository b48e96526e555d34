"""Processes and devices. Topology comes from `accelerate launch`; a launch that went wrong is refused here."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from clm_dist.engine.deepspeed import start_deepspeed
from clm_dist.engine.make import DEEPSPEED, FSDP
from clm_dist.errors import UserError
from clm_dist.training.determinism import reserve_workspace
from clm_dist.training.precision import check_precision

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # covers the main process writing a large model while the others wait
# What else an accelerate configuration can ask for, by the variable that its launcher sets.
UNSUPPORTED = {
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile (dynamo_config)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def launched_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher started, before any process group exists; 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))


def check_launch(mixed_precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a launch that says otherwise than the recipe, or that silently started one process instead of many."""
    for variable, what in UNSUPPORTED.items():
        given = environment.get(variable, "no").lower()
        if given not in ("no", "false", "0", ""):
            raise UserError(
                f"the accelerate configuration asks for {what} ({variable}={given}), which is not supported; leave it out"
            )
    by_deepspeed = environment.get(DEEPSPEED) == "true"  # whose checks say this together with all else
    launched_precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched_precision not in ("no", mixed_precision) and not by_deepspeed:
        raise UserError(
            f"the launcher says mixed_precision={launched_precision}, the recipe train.mixed_precision={mixed_precision}; "
            "leave it out of the accelerate configuration: the recipe owns it"
        )
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1" and not by_deepspeed:
        raise UserError(
            f"the launcher says gradient_accumulation_steps={accumulation}; leave it out of the accelerate configuration: "
            "it follows from train.global_batch_size, train.micro_batch_size and the number of processes"
        )
    # Accelerate's simple launcher sets MASTER_ADDR when it was told several processes, and then starts one: that is what
    # `distributed_type: MULTI_CPU` and `--cpu --num_processes 2` do.
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in environment
    if by_accelerate and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "the launcher was told to start several processes but started one (distributed_type MULTI_CPU or --cpu does "
            "that); launch with --config_file accelerate_configs/ddp.yaml, which works on CPU too"
        )
    # a step of srun, not the batch script around it, which knows of several tasks too and may well launch from one
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in environment:
        raise UserError(
            f"srun started {tasks} tasks and no launcher joined them: each would train by itself; start one task a node: "
            "srun --ntasks-per-node=1 accelerate launch ..."
        )
    check_precision(mixed_precision)


def start(mixed_precision: str, deepspeed: dict[str, Any] | None = None, idle_experts: bool = False) -> Accelerator:
    """The Accelerator of this process, with a world of the size that was launched. Every rank must call this.

    idle_experts: whether weights of the model may have no gradient in a step, which DDP then has to find out.
    """
    check_launch(mixed_precision)
    reserve_workspace()
    timeout = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    if deepspeed is None:
        # FSDP2 is ours to apply (engine/fsdp.py), and a command without an optimizer has nothing to share: plain processes
        for name in (DEEPSPEED, FSDP):
            os.environ.pop(name, None)
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            # without `cpu` Accelerate sees no way to join two launched processes on a machine without a GPU
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[
                timeout,
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=idle_experts),
            ],
        )
    else:
        accelerator = start_deepspeed(mixed_precision, deepspeed, timeout)
    group = dist.get_world_size() if dist.is_initialized() else 1
    if not launched_world_size() == group == accelerator.num_processes:
        raise UserError(
            f"{launched_world_size()} processes were launched, the process group has {group}, Accelerate sees "
            f"{accelerator.num_processes}; every one would train on all the data. "
            "Launch with --config_file accelerate_configs/ddp.yaml"
        )
    return accelerator


def finish(accelerator: Accelerator) -> None:
    """The last barrier, then the process group is taken down. Every rank must call this."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
