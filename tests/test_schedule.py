"""Learning rates, expected by hand."""

import pytest

from clm_dist.config import OptimConfig
from clm_dist.training.schedule import lr_at


def rates(steps, max_steps, **optim):
    return [round(lr_at(step, max_steps, OptimConfig(lr=1.0, **optim)), 6) for step in steps]


def test_linear():
    assert rates(range(4), 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(range(4), 4, min_lr_ratio=0.2) == [1.0, 0.8, 0.6, 0.4]


def test_warmup_rises_from_the_first_step():
    assert rates(range(4), 100, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
    assert rates(range(8), 8, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine():
    assert rates([0, 2, 4, 6, 8], 8, schedule="cosine") == [1.0, 0.853553, 0.5, 0.146447, 0.0]
    assert rates([4], 8, schedule="cosine", min_lr_ratio=0.1) == [0.55]


def test_constant():
    assert rates([0, 1, 99], 100, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0]


def test_wsd_is_flat_then_falls():
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(range(10), 10, schedule="wsd", warmup_steps=2, decay_steps=4) == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_all_warmup_and_decay_without_a_flat_part(schedule):
    optim = {"schedule": schedule, "warmup_steps": 5, **({"decay_steps": 5} if schedule == "wsd" else {})}
    values = rates(range(10), 10, **optim)
    assert max(values) == 1.0
    assert all(value > 0 for value in values)
