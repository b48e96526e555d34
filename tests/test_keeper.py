"""What the keeper does after a step, without a run around it."""

from types import SimpleNamespace

import pytest

from clm_dist.errors import RunError
from clm_dist.training.keeper import OVERFLOWS, Keeper


def keeper(overflows):
    """After each of its steps the engine says whether the update was left out; `noted` is what the ledger is told."""
    noted = []
    answers = iter(overflows)
    state = SimpleNamespace(step=0, steps=0, cursor=0, consumed="")
    return noted, SimpleNamespace(
        state=state,
        job=SimpleNamespace(plan=SimpleNamespace(global_batch_size=2)),
        engine=type("Engine", (), {"overflowed": property(lambda self: next(answers))})(),
        logbook=SimpleNamespace(step=lambda state, start, update: noted.append(update)),
        watch=SimpleNamespace(step=0),
        _overflows=0,
    )


def test_an_update_that_overflowed_is_none():
    noted, one = keeper([False, True, False])
    for verdict in ("update", "update", "skip"):
        Keeper.advance(one, verdict)
    assert noted == [True, False, False] and (one.state.step, one.state.cursor) == (3, 6)


def test_gradients_that_overflow_at_every_scale_end_the_run():
    """A step that fits in between begins the count anew."""
    _, one = keeper([True] * (OVERFLOWS - 1) + [False] + [True] * OVERFLOWS)
    for _ in range(2 * OVERFLOWS - 1):
        Keeper.advance(one, "update")
    with pytest.raises(RunError, match=r"overflowed in 50 steps .* set train.mixed_precision=bf16, or lower optim.lr"):
        Keeper.advance(one, "update")
