"""The tables of keys: what is refused, and whether DeepSpeed's own models have the same keys."""

import importlib
import json

import pytest
from zero import refused, resolved, with_key

from clm_dist.planning import deepspeed_refusals, deepspeed_schema

# Each would be harmless only with the value beside it.
HARMLESS = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1,
    "torch_autocast": {"enabled": False},
    "data_efficiency": {"enabled": False},
    "autotuning": {"enabled": False},
    "wandb": {"enabled": False},
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.offload_optimizer.ratio": 1.0,
}


@pytest.mark.parametrize("path", deepspeed_refusals.REFUSED)
def test_every_refused_key_is_named_with_its_value_and_a_remedy(path, tmp_path):
    (message,) = refused(with_key(path, "something"), tmp_path)
    assert message.startswith(f'ds.json: {path}="something" is refused: ')
    assert "leave" in message or "; write " in message


@pytest.mark.parametrize(("path", "value"), HARMLESS.items(), ids=HARMLESS)
def test_what_is_switched_off_is_let_pass_and_left_out(path, value, tmp_path):
    assert path.split(".")[-1] not in json.dumps(resolved(with_key(path, value), tmp_path).values)


SECTIONS = {
    "zero_optimization": "runtime.zero.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_param": "runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.offload_optimizer": "runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.leaf_module": "runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig",
    "bf16": "runtime.precision_config:DeepSpeedBF16Config",
    "fp16": "runtime.precision_config:DeepSpeedFP16Config",
    "comms_logger": "comm.config:CommsLoggerConfig",
    "timers.throughput": "utils.config:DeepSpeedThroughputTimerConfig",
}


@pytest.mark.parametrize(("section", "model"), SECTIONS.items(), ids=SECTIONS)
def test_our_table_has_deepspeeds_keys(section, model):
    """Every key of theirs is known or refused, and no key is known that they do not have."""
    pytest.importorskip("deepspeed")
    module, name = model.split(":")
    fields = getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields
    theirs = {field.alias or key for key, field in fields.items()}
    ours = deepspeed_schema.SCHEMA
    for key in section.split("."):
        ours = ours[key]
    beside = {path.rpartition(".")[2] for path in deepspeed_refusals.REFUSED if path.rpartition(".")[0] == section}
    assert not set(ours) & beside
    assert set(ours) <= theirs <= set(ours) | beside


def test_what_deepspeed_has_removed_is_refused():
    own = pytest.importorskip("deepspeed.runtime.config")
    zero = {f"zero_optimization.{key}" for key in own._REMOVED_ZERO_CONFIG_KEYS}
    assert set(own._REMOVED_TOP_LEVEL_CONFIG_KEYS) | zero <= set(deepspeed_refusals.REFUSED)
