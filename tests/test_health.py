"""Which steps are learned from: the same verdict from the same numbers, by hand."""

import pytest

from clm_dist.config import TrainConfig
from clm_dist.training.health import ENOUGH, WINDOW, Verdict, judge, remember

NAN, INF = float("nan"), float("inf")
USUAL = [1.9, 2.1] * 8  # 16 losses of mean 2 and deviation 0.1: six of these above it is 2.6


def train(**values):
    return TrainConfig(max_steps=1, **values)


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
@pytest.mark.parametrize(("loss", "finite", "cause"), [
    (NAN, True, "the loss is nan"),
    (INF, True, "the loss is inf"),
    (-INF, False, "the loss is -inf"),
    (2.0, False, "the gradient is not finite (the loss is 2.0000)"),
])  # fmt: skip
def test_what_is_not_finite_goes_by_its_own_policy(policy, loss, finite, cause):
    other = "skip" if policy == "stop" else "stop"
    assert judge(loss, finite, USUAL, train(on_nonfinite=policy, on_spike=other)) == Verdict(policy, cause)


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_a_spike_goes_by_its_own_policy(policy):
    found = judge(2.61, True, USUAL, train(on_nonfinite="stop", on_spike=policy))
    assert found == Verdict(policy, "the loss 2.6100 is above 2.6000: 2.0000 + 6 deviations")


@pytest.mark.parametrize(("loss", "action"), [(2.59, "update"), (2.61, "skip"), (0.0, "update"), (-5.0, "update")])
def test_only_what_is_far_above_is_a_spike(loss, action):
    assert judge(loss, True, USUAL, train(on_spike="skip")).action == action


@pytest.mark.parametrize(("deviations", "loss", "action"), [
    (1.0, 2.11, "skip"),
    (1.0, 2.09, "update"),
    (20.0, 3.9, "update"),
    (20.0, 4.1, "skip"),
])  # fmt: skip
def test_how_far_is_far_can_be_said(deviations, loss, action):
    assert judge(loss, True, USUAL, train(on_spike="skip", spike_deviations=deviations)).action == action


@pytest.mark.parametrize(("loss", "action"), [(2.11, "update"), (2.13, "skip")])
def test_noise_on_a_flat_curve_is_no_spike(loss, action):
    """The deviation of equal losses is 0; a hundredth of the mean stands for it: 2 + 6 * 0.02."""
    assert judge(loss, True, [2.0] * 64, train(on_spike="skip")).action == action


@pytest.mark.parametrize(
    ("count", "action"), [(0, "update"), (1, "update"), (15, "update"), (16, "skip"), (64, "skip")]
)
def test_few_losses_say_nothing(count, action):
    assert ENOUGH == 16
    assert judge(1e9, True, [2.0] * count, train(on_spike="skip")).action == action


def test_by_default_spikes_are_learned_from_and_nan_stops():
    assert judge(1e9, True, USUAL, train()) == Verdict("update")
    assert judge(NAN, True, USUAL, train()).action == "stop"


def test_a_usual_step_has_no_cause():
    assert judge(2.0, True, USUAL, train(on_spike="skip")) == Verdict("update", "")


def test_losses_are_remembered_newest_last_and_no_more_than_64():
    losses = []
    for number in range(70):
        remember(losses, float(number))
    assert losses == [float(number) for number in range(6, 70)]
    assert WINDOW == len(losses) == 64


def test_a_spike_that_is_not_remembered_stays_one():
    """Withheld losses do not become usual: the next of the same height is a spike, too."""
    losses, config = list(USUAL), train(on_spike="skip")
    for loss in (9.0, 9.0, 2.0):
        if judge(loss, True, losses, config).action == "update":
            remember(losses, loss)
    assert losses == [*USUAL, 2.0]
