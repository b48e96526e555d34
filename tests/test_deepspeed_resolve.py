"""DeepSpeed configurations that are right: every number from the recipe, no "auto" left, and DeepSpeed reads the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zero import GATHER, SHIPPED, refused, resolved, shipped, stage, two, with_key

from clm_dist.errors import ConfigError
from clm_dist.planning import deepspeed_refusals, deepspeed_schema
from clm_dist.planning.deepspeed_launch import read

# by hand: width 32, so 1024, 921.6 and 320; 12 sequences on 2 processes of 3
RECIPE = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
WIDE = {"stage3_prefetch_bucket_size": 921, "stage3_param_persistence_threshold": 320, GATHER: True}
CPU = {"device": "cpu"}
EXPECTED = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3, **WIDE},
    "zero3_offload": {"stage": 3, **WIDE, "offload_optimizer": CPU, "offload_param": CPU},
}


LAUNCHED = [path for path in SHIPPED if path.stem != "zero3_nvme"]


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_shipped_files_resolve_without_auto(path, tmp_path):
    whole = shipped(path.stem, tmp_path)
    assert whole.values == {**RECIPE, "zero_optimization": {"reduce_bucket_size": 1024, **EXPECTED[path.stem]}}
    assert whole.stage == EXPECTED[path.stem]["stage"] and whole.offloads == ("_" in path.stem)
    assert "auto" not in json.dumps(whole.values)


def test_lines_say_what_became_of_auto_and_why(tmp_path):
    lines = shipped("zero2", tmp_path).lines
    assert "gradient_clipping = 1.0 (optim.max_grad_norm=1.0)" in lines
    assert "zero_optimization.reduce_bucket_size = 1024 (hidden size 32 squared)" in lines
    assert not any("stage =" in line for line in lines)  # the file said that itself


def test_nothing_but_a_stage_is_enough(tmp_path):
    assert resolved(stage(2), tmp_path).values == {**RECIPE, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_added_up_in_fp32(tmp_path, precision):
    values = resolved(two(bf16={"enabled": "auto", "check_grad_overflow": False}), tmp_path, precision=precision).values
    assert values["bf16"] == {"enabled": precision == "bf16", "check_grad_overflow": False}
    assert values["fp16"] == {"enabled": precision == "fp16"}
    assert values["data_types"] == {"grad_accum_dtype": "fp32"} and values["communication_data_type"] == "fp32"
    assert resolved(stage(1), tmp_path, precision=precision).values["data_types"] == {"grad_accum_dtype": precision}


def test_choices_pass_through(tmp_path):
    given = two(steps_per_print=100, wall_clock_breakdown=True, communication_data_type="fp32")
    given["zero_optimization"] |= {
        "overlap_comm": True,
        "reduce_bucket_size": 5e8,
        "offload_optimizer": {"device": "none"},
    }
    before = json.dumps(given)
    values = resolved(given, tmp_path).values
    assert json.dumps(given) == before  # ours to read, not to change
    assert values["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 500_000_000}
    assert isinstance(values["zero_optimization"]["reduce_bucket_size"], int)
    assert (values["steps_per_print"], values["wall_clock_breakdown"]) == (100, True)


def paths(schema=deepspeed_schema.SCHEMA, prefix=""):
    for key, kind in schema.items():
        yield prefix + key
        if isinstance(kind, dict):
            yield from paths(kind, f"{prefix}{key}.")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["auto", "cpu", "fp32", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["enabled", "device", "params"]), inner)
    ),
)


@given(st.sampled_from([*paths(), *deepspeed_refusals.REFUSED, "optimizer", "scheduler", "unknown"]), JSON)
def test_any_value_anywhere_is_refused_or_resolved(tmp_path_factory, path, value):
    folder = tmp_path_factory.getbasetemp()
    try:
        values = resolved(with_key(path, value), folder).values
    except ConfigError as error:
        assert all(problem.startswith("ds.json: ") for problem in error.problems)
    else:
        assert '"auto"' not in json.dumps(values) or isinstance(value, list)


def test_the_example_for_a_disk_is_known_and_refused(tmp_path):
    """DeepSpeed reads it; a run would find out at its first checkpoint that it cannot be saved."""
    deepspeed = pytest.importorskip("deepspeed.runtime.config")
    [path] = [path for path in SHIPPED if path not in LAUNCHED]
    problems = refused(read(str(path)), tmp_path)
    assert [problem.split(":")[1] for problem in problems] == [
        " zero_optimization.offload_param.device=nvme",
        " zero_optimization.offload_optimizer.device=nvme",
    ]
    values = shipped("zero3_offload", tmp_path).values
    values["train_batch_size"] = 6
    example = read(str(path))["zero_optimization"]
    values["zero_optimization"] |= {name: example[name] for name in ("offload_param", "offload_optimizer")}
    zero = deepspeed.DeepSpeedConfig(values).zero_config
    assert str(zero.offload_param.nvme_path) == str(zero.offload_optimizer.nvme_path) == "/local_nvme"


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_deepspeed_reads_the_same(path, tmp_path):
    deepspeed = pytest.importorskip("deepspeed.runtime.config")
    values = shipped(path.stem, tmp_path).values
    values["train_batch_size"] = 6  # without a process group DeepSpeed sees a world of one
    own = deepspeed.DeepSpeedConfig(values)
    zero = values["zero_optimization"]
    assert (own.train_micro_batch_size_per_gpu, own.gradient_accumulation_steps) == (3, 2)
    assert (own.gradient_clipping, own.zero_optimization_stage) == (1.0, zero["stage"])
    assert own.zero_config.reduce_bucket_size == 1024
    assert (own.zero_config.offload_optimizer is not None) == ("offload_optimizer" in zero)
    assert not own.zero_force_ds_cpu_optimizer and own.zero_allow_untested_optimizer
    if zero["stage"] == 3:
        assert own.zero_config.param_persistence_threshold == 320
        assert own.zero_config.gather_16bit_weights_on_model_save
