"""The loss scale of fp16, which needs a GPU to train: what happens around an update, by torch's and DeepSpeed's scalers."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TINY_MODEL

from clm_dist.config import ModelConfig
from clm_dist.engine.replicated import Replicated
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration


@pytest.fixture
def engine():
    """One process whose loss is scaled, as Accelerate has it on a GPU."""
    accelerator = Accelerator(cpu=True)
    config = ModelConfig(**TINY_MODEL)
    model = build_model(config, model_configuration(config, {"vocab_size": 300}), 0)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    made = Replicated(accelerator, model, torch.optim.AdamW(model.parameters(), lr=1e-2), 1.0)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    yield made
    AcceleratorState._reset_state(True)


def backward(engine, factor=1.0):
    ids = torch.arange(16).view(1, 16)
    with engine.micro_step(last=True):
        engine.backward(engine.model(input_ids=ids).logits.float().square().mean() * factor)
    return engine.gradient_norm()


def test_a_step_may_follow_one_that_was_withheld(engine):
    """Clipping has unscaled the gradients, which torch lets happen once between two updates of the scale."""
    norm = backward(engine)
    before = engine.plain.lm_head.weight.detach().clone()
    engine.step(update=False)
    assert engine.plain.lm_head.weight.equal(before) and engine.accelerator.scaler.get_scale() == 1024
    assert backward(engine).equal(norm)  # no gradient and no scale was left over
    engine.step(update=True)
    assert not engine.overflowed and not engine.plain.lm_head.weight.equal(before)


def test_an_overflow_is_no_update_and_is_told(engine):
    before = engine.plain.lm_head.weight.detach().clone()
    backward(engine, float("inf"))
    engine.step(update=True)
    assert engine.overflowed and engine.plain.lm_head.weight.equal(before)
    assert engine.accelerator.scaler.get_scale() == 512


def test_the_scale_moves_between_engines(engine):
    """What DDP saved ZeRO goes on with, and the other way round: the scale, and how long it has been good."""
    fp16 = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    from clm_dist.engine.zero import Zero

    for _ in range(2):
        backward(engine)
        engine.step(update=True)
    saved = engine.scaler_state()
    assert saved == {"scale": 1024.0, "good_steps": 2}
    scaler = fp16.DynamicLossScaler(
        init_scale=2**16, scale_window=3, min_scale=1, delayed_shift=2,
        consecutive_hysteresis=False, raise_error_at_min_scale=True, dtype=torch.float16,
    )  # fmt: skip
    zero = SimpleNamespace(scales=True, zero=SimpleNamespace(loss_scaler=scaler))
    Zero.load_scaler_state(zero, saved)
    assert Zero.scaler_state(zero) == {**saved, "hysteresis": 2}
    scaler.update_scale(overflow=False)
    scaler.update_scale(overflow=False)
    assert scaler.cur_scale == 2048  # DeepSpeed grows it one step after torch
    later = Zero.scaler_state(zero)
    engine.load_scaler_state(later)
    assert engine.scaler_state() == {"scale": 2048.0, "good_steps": 4}
    scaler.cur_hysteresis = 1
    Zero.load_scaler_state(zero, {**later, "hysteresis": 1})
    assert Zero.scaler_state(zero) == {**later, "hysteresis": 1}
    static = SimpleNamespace(scales=True, zero=SimpleNamespace(loss_scaler=fp16.LossScaler(128)))
    Zero.load_scaler_state(static, saved)
    assert static.zero.loss_scaler.cur_scale == 128  # fp16.loss_scale of the configuration
