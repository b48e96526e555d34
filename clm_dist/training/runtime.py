"""Processes and devices. Topology comes from `accelerate launch`."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from clm_dist.engine.deepspeed import start_deepspeed
from clm_dist.errors import UserError
from clm_dist.training.allocator import keep_freed_memory
from clm_dist.training.determinism import reserve_workspace
from clm_dist.training.launch import DEEPSPEED, FSDP, check_launch, launched_world_size
from clm_dist.training.precision import check_precision

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # covers the main process writing a large model while the others wait
_left: list[Any] = []  # process groups of which this process was part


def start(mixed_precision: str, deepspeed: dict[str, Any] | None = None, idle_experts: bool = False) -> Accelerator:
    """The Accelerator of this process, with a world of the size that was launched. Every rank must call this.

    idle_experts: whether weights of the model may have no gradient in a step, which DDP then has to find out.
    """
    check_launch(mixed_precision)
    check_precision(mixed_precision)
    reserve_workspace()
    if not torch.accelerator.is_available():
        keep_freed_memory()
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
    """The last barrier, then the process group is taken down. Every rank must call this.

    Its object is kept. DDP's reducer would be the last to let go of it, with Python's lock held, and waits then for threads
    of gloo that may need that lock: one end of fifty hung on a busy machine (torch 2.13; pytorch #56297).
    """
    accelerator.wait_for_everyone()
    _left.append(dist.group.WORLD)
    accelerator.end_training()
