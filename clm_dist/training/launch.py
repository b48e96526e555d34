"""What a launcher asks for, by the environment that it sets: how many processes, which engine; what is wrong with it."""

import os
from collections.abc import Mapping

from clm_dist.errors import UserError

# what `accelerate launch` sets, by the distributed_type of its configuration
DEEPSPEED, FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"
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
    """Refuses a launch that says otherwise than the recipe, or that silently started one process instead of many.

    With mixed_precision=auto it does not know what the recipe says: to be asked again when that is settled.
    """
    for variable, what in UNSUPPORTED.items():
        given = environment.get(variable, "no").lower()
        if given not in ("no", "false", "0", ""):
            raise UserError(
                f"the accelerate configuration asks for {what} ({variable}={given}), which is not supported; leave it out"
            )
    by_deepspeed = environment.get(DEEPSPEED) == "true"  # whose checks say this together with all else
    launched_precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision != "auto" and launched_precision not in ("no", mixed_precision) and not by_deepspeed:
        raise UserError(
            f"the launcher says mixed_precision={launched_precision}, the recipe train.mixed_precision={mixed_precision}; "
            "leave it out of the accelerate configuration and the launcher's flags: the recipe owns it "
            f"(train.mixed_precision={launched_precision})"
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


def asked(environment: Mapping[str, str]) -> str:
    """The engine: replicated, zero or fsdp2."""
    if environment.get(DEEPSPEED) == "true":
        return "zero"
    return "fsdp2" if environment.get(FSDP) == "true" else "replicated"
