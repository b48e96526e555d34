"""One process, or DDP: an update that looks for itself whether its numbers are finite."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TINY_MODEL

from clm_dist.config import ModelConfig, OptimConfig
from clm_dist.engine.replicated import Replicated
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration
from clm_dist.training.optimizer import make_optimizer


@pytest.fixture
def engine():
    config = ModelConfig(**TINY_MODEL)
    model = build_model(config, model_configuration(config, {"vocab_size": 300}), 0)
    yield Replicated(Accelerator(cpu=True), model, make_optimizer(model, OptimConfig(lr=1e-2)), 1.0)
    AcceleratorState._reset_state(True)


def backward(engine, factor=1.0):
    torch.manual_seed(0)
    with engine.micro_step(last=True):
        engine.backward(engine.model(input_ids=torch.arange(16).view(1, 16)).logits.square().mean() * factor)
    engine.gradient_norm()


def held(engine):
    return copy.deepcopy([engine.plain.state_dict(), engine.optimizer.state_dict()])


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one.equal(other) if isinstance(one, torch.Tensor) else one == other


def test_a_bad_step_leaves_weights_moments_and_their_count(engine):
    backward(engine)
    engine.step(update=True)
    before = held(engine)
    backward(engine, float("nan"))
    engine.step_unless(torch.tensor(True))
    assert equal(held(engine), before)
    assert all(one.grad is None for one in engine.plain.parameters())


def test_a_good_step_is_a_step(engine):
    """After one that was left out too: to the last bit what an update is that nobody looked at."""
    backward(engine)
    engine.step(update=True)
    begin = held(engine)
    backward(engine)
    engine.step(update=True)
    wanted = held(engine)
    engine.plain.load_state_dict(begin[0])
    engine.optimizer.load_state_dict(begin[1])
    backward(engine, float("inf"))
    engine.step_unless(torch.tensor(True))
    backward(engine)
    engine.step_unless(torch.tensor(False))
    assert equal(held(engine), wanted) and not equal(wanted, begin)
