"""A live engine is compared with what was resolved; here its parts are stood in for."""

import re
from types import SimpleNamespace

import pytest
from zero import config, shipped

from clm_dist.planning.deepspeed_live import live_differences, optimizer_differences


def engine(values, **changes):
    """The parts of a DeepSpeedEngine that are asked, holding what was resolved but for `changes`."""
    zero = values["zero_optimization"]
    held = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bfloat16_enabled": False,
        "fp16_enabled": False,
        "zero_optimization_stage": zero["stage"],
        "zero_reduce_bucket_size": 1024,
        "zero_prefetch_bucket_size": 921,
        "zero_param_persistence_threshold": 320,
        "zero_gather_16bit_weights_on_model_save": True,
        "zero_offload_optimizer": SimpleNamespace(**zero["offload_optimizer"]) if "offload_optimizer" in zero else None,
        "zero_offload_param": None,
    }
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    parts = {"clip_grad": 1.0, "reduce_bucket_size": 1024, "cpu_offload": "offload_optimizer" in zero}
    parts["param_groups"] = [group, {**group, "weight_decay": 0.0}]
    parts |= changes.pop("optimizer", {})
    methods = {name: (lambda value=value: value) for name, value in {**held, **changes}.items()}
    return SimpleNamespace(**methods, optimizer=SimpleNamespace(**parts))


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_a_live_engine_as_resolved(name, tmp_path):
    values = shipped(name, tmp_path).values
    live = engine(values)
    assert live_differences(values, live) == []
    assert optimizer_differences(live.optimizer.param_groups, config(tmp_path).optim) == []


LIVE = {
    "clipping": ({"gradient_clipping": 0.0}, "gradient_clipping was resolved to 1.0 but the live engine holds 0.0"),
    "its copy": ({"optimizer": {"clip_grad": 0.5}}, "gradient_clipping .* holds 0.5 .optimizer.clip_grad"),
    "micro-batch": ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu .* 3 .* holds 4"),
    "precision": ({"bfloat16_enabled": True}, "bf16.enabled was resolved to false but .* holds true"),
    "bucket": ({"optimizer": {"reduce_bucket_size": 5}}, "reduce_bucket_size .* 1024 .* holds 5 "),
    "stage": ({"zero_optimization_stage": 1}, "stage was resolved to 2 but .* holds 1"),
    "offload": (
        {"optimizer": {"cpu_offload": True}},
        "offload_optimizer.device was resolved to null but .* holds true",
    ),
}
GROUP = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
GROUPS = {
    "lr": ([{**GROUP, "lr": 1.0}], "optim.lr was resolved to 0.01 but .* holds 1.0 .optimizer.param_groups.0..lr"),
    "no decay": (
        [{**GROUP, "weight_decay": 0.0}],
        "optim.weight_decay was resolved to 0.01 but .* holds 0.0 .*groups.0",
    ),
    "decay of biases": ([GROUP, GROUP], "optim.weight_decay was resolved to 0.0 but .* holds 0.01 .*groups.1"),
}


@pytest.mark.parametrize(("changes", "message"), LIVE.values(), ids=LIVE)
def test_a_live_engine_that_differs(changes, message, tmp_path):
    values = shipped("zero2", tmp_path).values
    (difference,) = live_differences(values, engine(values, **dict(changes)))
    assert re.search(message, difference), difference


@pytest.mark.parametrize(("groups", "message"), GROUPS.values(), ids=GROUPS)
def test_an_optimizer_that_differs(groups, message, tmp_path):
    (difference,) = optimizer_differences(groups, config(tmp_path).optim)
    assert re.search(message, difference), difference
