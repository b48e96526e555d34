"""The arithmetic of a run."""

import pytest
from conftest import recipe_values

from clm_dist import recipe
from clm_dist.errors import ConfigError
from clm_dist.training.plan import make_plan


def plan(tmp_path, world_size, num_blocks=1000, **train):
    train = {"max_steps": None, "epochs": 2, **train}
    return make_plan(recipe.build(recipe_values(tmp_path, train=train)), num_blocks, world_size)


def test_the_parts_of_a_step(tmp_path):
    made = plan(tmp_path, 4, global_batch_size=64, micro_batch_size=8)
    assert (made.micro_batch_size, made.gradient_accumulation_steps, made.tokens_per_step) == (8, 2, 1024)
    assert made.max_steps == 32  # 2 x 1000 blocks / 64 = 31.25
    assert str(made) == (
        "4 processes x 8 sequences x 2 accumulation x 16 tokens = 1,024 tokens per step; "
        "32 steps = 2.05 epochs of 1,000 blocks"
    )


def test_without_a_micro_batch_size_there_is_no_accumulation(tmp_path):
    made = plan(tmp_path, 4, global_batch_size=64)
    assert (made.micro_batch_size, made.gradient_accumulation_steps) == (16, 1)


def test_evaluations_at_each_epoch_and_at_the_end(tmp_path):
    made = plan(tmp_path, 1, num_blocks=100, global_batch_size=40)
    assert [step for step in range(1, made.max_steps + 1) if made.evaluation_due(step)] == [3, 5]


@pytest.mark.parametrize(
    ("world_size", "train", "needle"),
    [
        (3, {"global_batch_size": 8}, "not divisible by 3 processes; set a multiple of 3, or launch one of 1, 2, 4, 8"),
        (2, {"global_batch_size": 12, "micro_batch_size": 4}, "set a micro_batch_size among 1, 2, 3, 6"),
        (1, {"global_batch_size": 1001}, "1000 training blocks are fewer than one step's train.global_batch_size=1001"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(tmp_path, world_size, train, needle):
    with pytest.raises(ConfigError, match=needle.replace("(", r"\(")):
        plan(tmp_path, world_size, **train)


def test_warmup_longer_than_the_run(tmp_path):
    values = recipe_values(tmp_path, train={"max_steps": None, "epochs": 1}, optim={"warmup_steps": 500})
    with pytest.raises(ConfigError, match="warmup_steps=500 does not fit into the 84 steps"):
        make_plan(recipe.build(values), 1000, 1)
