"""A recorded micro-step: the same numbers as one that is launched kernel by kernel, whatever comes before it."""

import pytest
import torch

from clm_dist.config.learning import TrainConfig
from clm_dist.engine.captured import Captured, why_not

B, T = 2, 9


def tape(what):
    """Records as a CUDA graph does: what runs again reads and writes the memory of the first time. On a CPU."""
    before = {one: one.grad for one in WEIGHTS}
    nll = what()
    made = {one: one.grad for one in WEIGHTS}

    def again():
        held = {one: one.grad for one in WEIGHTS}
        for one in WEIGHTS:
            one.grad = before[one]
        nll.copy_(what())
        for one in WEIGHTS:
            if before[one] is None:
                made[one].copy_(one.grad)
            one.grad = held[one]

    return nll, again


WEIGHTS = [torch.nn.Parameter(torch.zeros(11, 4)), torch.nn.Parameter(torch.zeros(4, 11))]


def learn(ids, scored, weight):
    hidden = torch.nn.functional.embedding(ids, WEIGHTS[0])
    nll = (hidden.tanh() @ WEIGHTS[1]).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    nll = -(nll * scored).sum()
    (nll * weight).backward()
    return nll.detach()


@pytest.fixture
def weights():
    torch.manual_seed(0)
    for one in WEIGHTS:
        one.data.normal_()
        one.grad = None
    yield WEIGHTS
    for one in WEIGHTS:
        one.grad = None


def batches():
    torch.manual_seed(1)
    for number in range(6):
        scored = None if number % 3 == 0 else torch.rand(B, T - 1) < 0.5
        yield torch.randint(11, (B, T)), scored, 1 / (number + 1)


def steps(micro_step, micro_steps, weights):
    """Losses and gradients of updates of so many micro-steps each."""
    found = []
    for number, (ids, scored, weight) in enumerate(batches(), start=1):
        found.append(micro_step(ids, scored, weight).clone())
        if number % micro_steps == 0:
            found += [one.grad.clone() for one in weights]
            for one in weights:
                one.data.sub_(one.grad)
                one.grad = None
    return found


@pytest.mark.parametrize("micro_steps", [1, 2, 3])
def test_a_recording_computes_what_is_computed_without(weights, micro_steps):
    start = [one.detach().clone() for one in weights]
    everything = torch.ones(B, T - 1, dtype=torch.bool)

    def plain(ids, scored, weight):
        return learn(ids, everything if scored is None else scored, torch.tensor(weight))

    wanted = steps(plain, micro_steps, weights)
    for one, value in zip(weights, start, strict=True):
        one.data.copy_(value)
    captured = Captured(learn, weights, (B, T), torch.device("cpu"), micro_steps > 1, tape)
    assert all(one.grad is None for one in weights)
    found = steps(captured, micro_steps, weights)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_what_failed_leaves_no_gradients(weights):
    def broken(what):
        what()
        raise RuntimeError("not to be recorded")

    with pytest.raises(RuntimeError, match="not to be recorded"):
        Captured(learn, weights, (B, T), torch.device("cpu"), False, broken)
    assert all(one.grad is None for one in weights)


@pytest.mark.parametrize(
    ("train", "alone", "precision", "why"),
    [
        ({}, True, "bf16", None),
        ({}, True, "no", None),
        ({}, False, "bf16", "exchanged"),
        ({}, True, "fp16", "mixed_precision=fp16"),
        ({"activation_checkpointing": "selective"}, True, "no", "activation_checkpointing"),
        ({"isolate_documents": True}, True, "no", "isolate_documents"),
    ],
)
def test_where_it_cannot_it_says_why(train, alone, precision, why):
    found = why_not(TrainConfig(max_steps=1, **train), alone, precision)
    assert found is why if why is None else why in found


def test_off_is_a_word():
    assert TrainConfig(max_steps=1, cuda_graph=False).cuda_graph == "off"
