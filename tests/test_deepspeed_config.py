"""DeepSpeed configurations: wrong ones give one message with both values and a remedy, right ones are resolved."""

import importlib
import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, recipe_values
from hypothesis import given
from hypothesis import strategies as st

from clm_dist import recipe
from clm_dist.errors import ConfigError
from clm_dist.planning import deepspeed_refusals, deepspeed_schema
from clm_dist.planning.deepspeed_config import resolve
from clm_dist.planning.deepspeed_launch import read
from clm_dist.planning.deepspeed_live import live_differences

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
GATHER = "stage3_gather_16bit_weights_on_model_save"


def config(tmp_path, precision="no", norm=1.0, lr=0.01):
    """12 sequences a step: on 2 processes of 3 sequences, 2 micro-steps."""
    train = {"mixed_precision": precision, "micro_batch_size": 3}
    return recipe.build(recipe_values(tmp_path, train=train, optim={"max_grad_norm": norm, "lr": lr}))


def resolved(values, tmp_path, hidden_size=32, device="cuda", **options):
    where = {"world_size": 2, "micro_batch_size": 3, "gradient_accumulation_steps": 2}
    return resolve(values, "ds.json", config(tmp_path, **options), hidden_size=hidden_size, device=device, **where)


def refused(values, tmp_path, **options):
    with pytest.raises(ConfigError) as caught:
        resolved(values, tmp_path, **options)
    return caught.value.problems


def stage(number, **zero):
    return {"zero_optimization": {"stage": number, **zero}}


def two(**top):
    return {**stage(2), **top}


# a configuration, and the one sentence about it; what the recipe says is that of `config` above
BAD = {
    "train batch": (
        two(train_batch_size=16),
        "train_batch_size=16 but train.global_batch_size=12 (2 processes x 3 sequences x 2 accumulation); "
        'write "auto", or change the recipe',
    ),
    "micro-batch": (
        two(train_micro_batch_size_per_gpu=4),
        'train_micro_batch_size_per_gpu=4 but train.micro_batch_size=3; write "auto", or change the recipe',
    ),
    "accumulation": (
        two(gradient_accumulation_steps=4),
        "gradient_accumulation_steps=4 but 2 follows from train.global_batch_size=12 / (2 processes x 3 sequences); "
        'write "auto", or change the recipe',
    ),
    "clipping": (
        two(gradient_clipping=0.5),
        'gradient_clipping=0.5 but optim.max_grad_norm=1.0; write "auto", or change the recipe',
    ),
    "bf16": (
        two(bf16={"enabled": True}),
        'bf16.enabled=true but train.mixed_precision=no; write "auto", or change the recipe',
    ),
    "fp16": (
        two(fp16={"enabled": True}),
        'fp16.enabled=true but train.mixed_precision=no; write "auto", or change the recipe',
    ),
    "optimizer": (
        two(optimizer={"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95]}}),
        'the optimizer block of type "AdamW" (lr=0.001 there, optim.lr=0.01 here; betas=[0.9, 0.95] there, optim.beta1=0.9 '
        "and optim.beta2=0.999 here) would stand beside the recipe's AdamW with optim.lr, beta1, beta2, eps; "
        "remove the block",
    ),
    "muon": (
        two(optimizer={"type": "Muon"}),
        'the optimizer block of type "Muon" would stand beside the recipe\'s AdamW with optim.lr, beta1, beta2, eps; '
        "remove the block",
    ),
    "scheduler": (
        two(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),
        'the scheduler block of type "WarmupLR" (warmup_num_steps=10 there, optim.warmup_steps=0 here) would stand beside '
        "the recipe's optim.schedule, a function of the step; remove the block",
    ),
    "gathering": (
        stage(3, **{GATHER: False}),
        f"zero_optimization.{GATHER}=false would keep Accelerate's get_state_dict from handing out whole weights, but an "
        'export needs them; write "auto" or true',
    ),
    "bucket of 0": (
        stage(2, reduce_bucket_size=0),
        "zero_optimization.reduce_bucket_size=0 must be a whole number above 0; correct it, or leave the key out",
    ),
    "negative bucket": (
        stage(2, allgather_bucket_size=-5e8),
        "zero_optimization.allgather_bucket_size=-500000000.0 must be a whole number above 0; correct it, "
        "or leave the key out",
    ),
    "broken bucket": (
        stage(3, stage3_prefetch_bucket_size=1.5),
        "zero_optimization.stage3_prefetch_bucket_size=1.5 must be a whole number of at least 0; correct it, "
        "or leave the key out",
    ),
    "misspelt at the top": (
        two(gradient_cliping=1.0),
        "unknown key gradient_cliping, which DeepSpeed may pass over in silence; did you mean gradient_clipping?",
    ),
    "misspelt below": (
        stage(2, overlap_com=True),
        "unknown key zero_optimization.overlap_com, which DeepSpeed may pass over in silence; did you mean overlap_comm?",
    ),
    "misspelt two below": (
        stage(2, offload_optimizer={"device": "cpu", "pin_memry": True}),
        "unknown key zero_optimization.offload_optimizer.pin_memry, which DeepSpeed may pass over in silence; "
        "did you mean pin_memory?",
    ),
    "misspelt in aio": (
        two(aio={"queue_deph": 8}),
        "unknown key aio.queue_deph, which DeepSpeed may pass over in silence; did you mean queue_depth?",
    ),
    "without stage 3's prefix": (
        stage(3, param_persistence_threshold=10),
        "unknown key zero_optimization.param_persistence_threshold, which DeepSpeed may pass over in silence; "
        "did you mean stage3_param_persistence_threshold?",
    ),
    "misspelt block": (
        two(optimiser={"type": "AdamW"}),
        "unknown key optimiser, which DeepSpeed may pass over in silence; did you mean optimizer?",
    ),
    "stage 0": (
        stage(0),
        "zero_optimization.stage=0 shards nothing; set 1, 2 or 3, or launch with accelerate_configs/ddp.yaml, which needs "
        "no DeepSpeed",
    ),
    "no stage": (
        {"zero_optimization": {}},
        "zero_optimization.stage=null shards nothing; set 1, 2 or 3, or launch with accelerate_configs/ddp.yaml, which "
        "needs no DeepSpeed",
    ),
    "stage in words": (
        {"zero_optimization": {"stage": "two"}},
        'zero_optimization.stage="two" must be 1, 2 or 3; correct it, or leave the key out',
    ),
    "a switch for a section": (
        {"zero_optimization": True},
        "zero_optimization=true must be a section; write {stage, contiguous_gradients, reduce_scatter, ...}",
    ),
    "yes": (
        two(bf16={"enabled": "yes"}),
        'bf16.enabled="yes" must be true or false; correct it, or leave the key out',
    ),
    "auto without a meaning": (
        stage(2, overlap_comm="auto"),
        'zero_optimization.overlap_comm="auto" has no value in a recipe; write true or false, or leave the key out',
    ),
    "parameters at stage 2": (
        stage(2, offload_param={"device": "cpu"}),
        'zero_optimization.offload_param.device="cpu" needs zero_optimization.stage=3, given is 2: only stage 3 shards '
        "parameters; leave offload_param out or set stage 3",
    ),
    "keys of stage 3 at stage 1": (
        stage(1, stage3_max_live_parameters=1e9),
        "zero_optimization.stage3_max_live_parameters=1000000000 is for stage 3, but zero_optimization.stage=1; leave it "
        "out or set stage 3",
    ),
    "nvme at stage 2": (
        stage(2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
        "zero_optimization.offload_optimizer.device=nvme needs zero_optimization.stage=3, given is 2, which would take it "
        "for cpu; write cpu or set stage 3",
    ),
    "nvme without a path": (
        stage(3, offload_param={"device": "nvme"}),
        "zero_optimization.offload_param.device=nvme without nvme_path; add the path of a folder on a local disk",
    ),
    "a path without nvme": (
        stage(3, offload_optimizer={"device": "cpu", "nvme_path": "/nvme"}),
        'zero_optimization.offload_optimizer.nvme_path="/nvme" but device="cpu"; write device nvme or leave the path out',
    ),
    "no such device": (
        stage(3, offload_optimizer={"device": "disk"}),
        'zero_optimization.offload_optimizer.device="disk" must be one of none, cpu, nvme; correct it, '
        "or leave the key out",
    ),
    "sequential gathering": (
        stage(3, stage3_allgather_sequential=True, stage3_prefetch_bucket_size=100),
        "zero_optimization.stage3_prefetch_bucket_size=100 but stage3_allgather_sequential=true, with which DeepSpeed "
        "takes 1; leave one of them out",
    ),
    "sums in bf16": (
        two(data_types={"grad_accum_dtype": "bf16"}),
        'data_types.grad_accum_dtype="bf16" would add gradients up in bf16, but sums are fp32 at every '
        'train.mixed_precision (here no); write "fp32" or leave the key out',
    ),
    "weights in bf16": (
        two(data_types={"param_dtype": "bf16"}),
        'data_types.param_dtype="bf16" but train.mixed_precision=no computes in fp32; leave the key out',
    ),
    "sent in fp16": (
        two(communication_data_type="fp16"),
        'communication_data_type="fp16" but train.mixed_precision=no computes in fp32; write fp32, or leave the key out',
    ),
    "untested optimizer": (
        two(zero_allow_untested_optimizer=False),
        "zero_allow_untested_optimizer=false is refused: the optimizer is torch's AdamW, which DeepSpeed takes with true "
        "only; leave the key out",
    ),
    "DeepSpeed's Adam": (
        two(zero_force_ds_cpu_optimizer=True),
        "zero_force_ds_cpu_optimizer=true is refused: the optimizer is torch's AdamW, also where its states are offloaded; "
        "DeepSpeed's own would be compiled at start; leave the key out",
    ),
    "deprecated offload": (
        stage(2, cpu_offload=True),
        "zero_optimization.cpu_offload=true is refused: DeepSpeed has renamed it; "
        'write offload_optimizer: {"device": "cpu"}',
    ),
    "partial offload": (
        stage(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        "zero_optimization.offload_optimizer.ratio=0.5 is refused: it needs DeepSpeed's own Adam, and a run takes torch's "
        "AdamW; leave the key out",
    ),
    "no gradient norm": (
        stage(2, compute_grad_norm=False),
        "zero_optimization.compute_grad_norm=false is refused: every log line shows the gradient norm, and clipping needs "
        "it; leave the key out",
    ),
    "accumulation unmanaged": (
        two(managed_gradient_accumulation=False),
        "managed_gradient_accumulation=false is refused: DeepSpeed has to know the last micro-step of a step; "
        "leave the key out",
    ),
    "universal checkpoints": (
        two(checkpoint={"load_universal": True}),
        'checkpoint={"load_universal": true} is refused: checkpoints are the recipe\'s (checkpoint.save_every and beside '
        "it); leave the block out",
    ),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_a_bad_configuration_gives_one_message(values, message, tmp_path):
    assert refused(values, tmp_path) == [f"ds.json: {message}"]


def test_messages_are_distinct():
    assert len(BAD) >= 30 and len({message for _, message in BAD.values()}) == len(BAD)


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


def with_key(path, value):
    values = stage(3)
    *sections, key = path.split(".")
    section = values
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    return values


@pytest.mark.parametrize("path", deepspeed_refusals.REFUSED)
def test_every_refused_key_is_named_with_its_value_and_a_remedy(path, tmp_path):
    (message,) = refused(with_key(path, "something"), tmp_path)
    assert message.startswith(f'ds.json: {path}="something" is refused: ')
    assert "leave" in message or "; write " in message


@pytest.mark.parametrize(("path", "value"), HARMLESS.items(), ids=HARMLESS)
def test_what_is_switched_off_is_let_pass_and_left_out(path, value, tmp_path):
    assert path.split(".")[-1] not in json.dumps(resolved(with_key(path, value), tmp_path).values)


def test_everything_is_said_at_once(tmp_path):
    values = {**stage(2, stag=2, offload_param={"device": "cpu"}), "gradient_clipping": 0.5, "train_batch": 8}
    problems = refused({**values, "scheduler": {"type": "WarmupLR"}}, tmp_path)
    needles = [
        "_optimization.stag,",
        "unknown key train_batch,",
        "offload_param.device",
        "gradient_clipping",
        "scheduler",
    ]
    assert len(problems) == len(needles)
    assert all(needle in problem for needle, problem in zip(needles, problems, strict=True))


def test_no_clipping_is_said_too(tmp_path):
    (message,) = refused(two(gradient_clipping=1.0), tmp_path, norm=None)
    assert "gradient_clipping=1.0 but optim.max_grad_norm=null" in message
    # DeepSpeed would clip at 1.0 where the key is not there
    assert resolved(two(), tmp_path, norm=None).values["gradient_clipping"] == 0.0


def test_the_recipes_precision_may_be_the_one_that_is_not_there(tmp_path):
    (message,) = refused(two(bf16={"enabled": False}), tmp_path, precision="bf16")
    assert "bf16.enabled=false but train.mixed_precision=bf16" in message
    both = refused(two(bf16={"enabled": False}, fp16={"enabled": True}), tmp_path, precision="bf16")
    assert len(both) == 2 and "fp16.enabled=true but train.mixed_precision=bf16" in both[1]
    (message,) = refused(two(communication_data_type="fp16"), tmp_path, precision="bf16")
    assert "write bf16 or fp32" in message
    (message,) = refused(two(), tmp_path, precision="fp16", device="cpu")
    assert "train.mixed_precision=fp16 needs a GPU, and the run is on cpu" in message


def test_a_model_without_a_width(tmp_path):
    (message,) = refused(stage(2, reduce_bucket_size="auto"), tmp_path, hidden_size=None)
    assert message.endswith(
        "goes by the hidden size of the model, which it does not tell; write numbers of elements, e.g. 5e7"
    )
    assert resolved(stage(2, reduce_bucket_size=5e7), tmp_path, hidden_size=None)


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
DISK = {"device": "nvme", "nvme_path": "/local_nvme"}
EXPECTED = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3, **WIDE},
    "zero3_offload": {"stage": 3, **WIDE, "offload_optimizer": CPU, "offload_param": CPU},
    "zero3_nvme": {"stage": 3, **WIDE, "offload_optimizer": DISK, "offload_param": DISK},
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve_without_auto(path, tmp_path):
    whole = resolved(read(str(path)), tmp_path)
    assert whole.values == {**RECIPE, "zero_optimization": {"reduce_bucket_size": 1024, **EXPECTED[path.stem]}}
    assert whole.stage == EXPECTED[path.stem]["stage"] and whole.offloads == ("_" in path.stem)
    assert "auto" not in json.dumps(whole.values)


def test_lines_say_what_became_of_auto_and_why(tmp_path):
    lines = resolved(read(str(ROOT / "ds_configs" / "zero2.json")), tmp_path).lines
    assert "gradient_clipping = 1.0 (optim.max_grad_norm=1.0)" in lines
    assert "zero_optimization.reduce_bucket_size = 1024 (hidden size 32 squared)" in lines
    assert not any("stage =" in line for line in lines)  # the file said that itself


def test_nothing_but_a_stage_is_enough(tmp_path):
    assert resolved(stage(2), tmp_path).values == {**RECIPE, "zero_optimization": {"stage": 2}}


def test_bf16_is_added_up_in_fp32(tmp_path):
    values = resolved(two(bf16={"enabled": "auto", "check_grad_overflow": False}), tmp_path, precision="bf16").values
    assert values["bf16"] == {"enabled": True, "check_grad_overflow": False} and values["fp16"] == {"enabled": False}
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}


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


# DeepSpeed's own opinion. None of it needs a process group.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_reads_the_same(path, tmp_path):
    deepspeed = pytest.importorskip("deepspeed.runtime.config")
    values = resolved(read(str(path)), tmp_path).values
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
    values = resolved(read(str(ROOT / "ds_configs" / f"{name}.json")), tmp_path).values
    assert live_differences(values, engine(values), config(tmp_path).optim) == []


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
    "lr": (
        {"optimizer": {"param_groups": [{"lr": 1.0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}]}},
        "optim.lr was resolved to 0.01 but .* holds 1.0 .optimizer.param_groups.0..lr",
    ),
}


@pytest.mark.parametrize(("changes", "message"), LIVE.values(), ids=LIVE)
def test_a_live_engine_that_differs(changes, message, tmp_path):
    values = resolved(read(str(ROOT / "ds_configs" / "zero2.json")), tmp_path).values
    (difference,) = live_differences(values, engine(values, **dict(changes)), config(tmp_path).optim)
    assert re.search(message, difference), difference
