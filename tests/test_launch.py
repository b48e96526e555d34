"""Launches that went wrong are refused before anything starts."""

import pytest

from clm_dist.errors import UserError
from clm_dist.training.launch import check_launch

LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("precision", "environment", "needle"),
    [
        (
            "no",
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "the launcher says mixed_precision=bf16, the recipe .*=no; .* owns it \\(train.mixed_precision=bf16",
        ),
        ("no", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "launcher says gradient_accumulation_steps=4"),
        ("no", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 tasks and no launcher joined them"),
        ("no", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "asks for torch.compile .dynamo_config. .* leave it out"),
        ("no", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for parallelism_config .* leave it out"),
        ("no", {**LAUNCHED, "MASTER_ADDR": "127.0.0.1"}, "told to start several processes but started one"),
    ],
)
def test_disagreements_with_the_launcher(precision, environment, needle):
    with pytest.raises(UserError, match=needle):
        check_launch(precision, environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LAUNCHED,
        {**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "4"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"},
        {"MASTER_ADDR": "node1"},  # a batch script's own variable, without Accelerate's launcher
        {**LAUNCHED, "ACCELERATE_MIXED_PRECISION": "bf16"},
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_MIXED_PRECISION": "fp16",
        },  # said with all else, by sharding.py
    ],
)
def test_launches_that_are_right(environment):
    check_launch("bf16", environment)


def test_a_precision_that_is_not_settled_is_asked_again():
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    check_launch("auto", environment)
    with pytest.raises(UserError, match=r"launcher says mixed_precision=bf16"):
        check_launch("no", environment)
