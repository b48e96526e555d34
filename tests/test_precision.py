"""What `train.mixed_precision: auto` becomes, by machine; and precisions that a machine does not have."""

from types import SimpleNamespace

import pytest
import torch
from conftest import recipe_values

from clm_dist import recipe
from clm_dist.engine.replicated import Replicated
from clm_dist.errors import UserError
from clm_dist.training import precision
from clm_dist.training.check import check
from clm_dist.training.precision import check_precision, settle_precision


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name, capability, bf16): a machine with such a GPU."""

    def made(name, capability, bf16):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)

    return made


def settled(folder, value="auto"):
    config, line = settle_precision(recipe.build(recipe_values(folder, train={"mixed_precision": value})))
    return config.train.mixed_precision, line


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settled(tmp_path) == ("no", "train.mixed_precision=auto is no: no GPU here, and fp32 is exact")
    assert settled(tmp_path, "bf16") == ("bf16", None)  # what was said is not touched
    with pytest.raises(UserError, match=r"fp16 needs a GPU; set train\.mixed_precision=bf16 or no"):
        check_precision("fp16")
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.9 or higher, and there is none; set"):
        check_precision("fp8")


def test_by_what_the_gpu_has(tmp_path, gpu):
    gpu("H100", (9, 0), True)
    assert settled(tmp_path) == (
        "bf16",
        "train.mixed_precision=auto is bf16: H100 computes in it, with the range of fp32: no loss scaling",
    )
    gpu("V100", (7, 0), False)
    chosen, line = settled(tmp_path)
    assert chosen == "no" and line.endswith("V100 has no bf16; fp16, with loss scaling, is there when asked for")
    check_precision("fp16")
    with pytest.raises(UserError, match=r"8\.9 or higher, V100 has 7\.0; set train\.mixed_precision=bf16"):
        check_precision("fp8")


def test_fp8_needs_a_library(gpu, monkeypatch):
    gpu("H100", (9, 0), True)
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs torchao or transformer_engine, and neither is installed"):
        check_precision("fp8")
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: name == "torchao" or None)
    check_precision("fp8")


@pytest.mark.parametrize("scaled", ["fp16", "fp8"])
def test_check_says_what_it_cannot_compare(tmp_path, scaled):
    with pytest.raises(UserError, match=f"train.mixed_precision={scaled} scales its loss or its numbers.*; check with"):
        check(recipe.build(recipe_values(tmp_path, train={"mixed_precision": scaled})))


def replaced(layer, maker):
    """A kind of layer as these libraries have it: where it is defined is how it is known."""
    return type(layer.__name__, (layer,), {"__module__": maker})


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (replaced(torch.nn.Linear, "torchao.float8.float8_linear"), True),
        (replaced(torch.nn.Linear, "transformer_engine.pytorch.module.linear"), True),
        (replaced(torch.nn.LayerNorm, "transformer_engine.pytorch.module.layernorm"), False),
        (torch.nn.Linear, False),
    ],
)
def test_fp8_that_nothing_computes_in_is_refused(kind, good):
    """GPT-2 trained in bf16 under this name on an H100: its Conv1D is no layer that torchao replaces."""
    model = torch.nn.Sequential(kind(2, 2) if issubclass(kind, torch.nn.Linear) else kind(2))
    stepper = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))
    accelerator = SimpleNamespace(
        mixed_precision="fp8", num_processes=1, prepare=lambda *given: (given[0], stepper), device=torch.device("cpu")
    )
    if good:
        Replicated(accelerator, model, stepper.optimizer, None)
    else:
        with pytest.raises(UserError, match="Sequential has no layer that computes in fp8"):
            Replicated(accelerator, model, stepper.optimizer, None)
