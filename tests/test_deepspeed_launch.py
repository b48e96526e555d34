"""Whether DeepSpeed was asked for, where its configuration stands, and a launcher that says otherwise."""

import json

import pytest
from conftest import ROOT, recipe_values

from clm_dist import recipe
from clm_dist.errors import ConfigError
from clm_dist.planning import deepspeed_launch
from clm_dist.planning.deepspeed_config import resolve
from clm_dist.planning.deepspeed_launch import INLINE, Launched, launch_problems, launched

ASKED = {"ACCELERATE_USE_DEEPSPEED": "true"}
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    return str(path)


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_DEEPSPEED": "false"}, {STAGE: "2"}, {FILE: "two.json"}])
def test_not_asked_for(environment):
    assert launched(environment) is None


def test_a_file_by_accelerate_or_by_our_own_variable(two):
    values = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    for environment in (
        {**ASKED, FILE: two},
        {"CLM_DIST_DEEPSPEED": two},
        {**ASKED, FILE: two, "CLM_DIST_DEEPSPEED": two},
    ):
        assert launched(environment) == Launched(two, values)


def test_two_files(two):
    with pytest.raises(
        ConfigError, match=r"--deepspeed a.json but .* deepspeed_config_file=.*two.json; give one of them"
    ):
        launched({**ASKED, FILE: two, "CLM_DIST_DEEPSPEED": "a.json"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "bad.json: No such file or directory; name a DeepSpeed JSON, e.g. ds_configs/zero2.json"),
        ('{\n  "a": 1,\n}', "bad.json: line .*, column .* is no JSON: .*; correct it .JSON has no comments."),
        ('{"a": {"b": 1, "b": 2}}', "bad.json: the key b stands there twice; keep one of them"),
        ("[1]", r"bad.json: \[1\] is no section; write an object as in ds_configs/zero2.json"),
    ],
)
def test_no_configuration(text, message, tmp_path):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        launched({"CLM_DIST_DEEPSPEED": str(path)})


def test_fields_inside_the_accelerate_configuration():
    """As Accelerate's questionnaire writes them for ZeRO-3 with optimizer states on the CPU."""
    environment = {
        **ASKED,
        STAGE: "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert launched(environment) == Launched(INLINE, {"zero_optimization": zero})
    assert launched(environment).inline
    # where nothing is said Accelerate takes stage 2
    assert launched(ASKED).values == {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}


def test_fields_are_checked_and_resolved_as_a_file_is(tmp_path):
    config = recipe.build(recipe_values(tmp_path))
    run = {"world_size": 2, "micro_batch_size": 6, "gradient_accumulation_steps": 1, "hidden_size": 32}
    found = launched({**ASKED, STAGE: "2"})
    assert resolve(found.values, found.source, config, **run).values["zero_optimization"]["reduce_bucket_size"] == 1024
    found = launched({**ASKED, STAGE: "2", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"})
    with pytest.raises(
        ConfigError, match=r"the accelerate configuration: zero_optimization.offload_param.device=\"cpu\""
    ):
        resolve(found.values, found.source, config, **run)


GOOD = {**ASKED, "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu", "ACCELERATE_MIXED_PRECISION": "no"}
OWNED = "leave it out of the accelerate configuration: the recipe owns it"
BESIDE = "the file owns it"
PROBLEMS = {
    "use_cpu": (
        {"ACCELERATE_USE_CPU": "true"},
        "the launcher says use_cpu=true, with which Accelerate drops DeepSpeed in silence; leave use_cpu out: where "
        "there is no GPU, processes on the CPU are started",
    ),
    "FSDP": (
        {"ACCELERATE_USE_FSDP": "true"},
        "the launcher asks for FSDP (ACCELERATE_USE_FSDP=true) and for DeepSpeed, which both shard the model; launch with "
        "one accelerate configuration: fsdp2.yaml or one of zero*.yaml",
    ),
    "accelerator": (
        {"DS_ACCELERATOR": "cuda"},
        "DS_ACCELERATOR=cuda but the run is on cpu; unset it in the environment",
    ),
    "world": (
        {"WORLD_SIZE": "4"},
        "WORLD_SIZE=4 processes were launched but the run was planned for 2; set --num_processes 2",
    ),
    "init": (
        {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
        "the launcher says zero3_init_flag=true, but a model is built whole on every process before it is sharded, so that "
        "it starts from the same weights at every world size; set zero3_init_flag: false",
    ),
    "precision": (
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        f"the launcher says mixed_precision=bf16 but train.mixed_precision=no; {OWNED}",
    ),
    "clipping": (
        {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
        f"the launcher says gradient_clipping=0.5 but optim.max_grad_norm=1.0; {OWNED}",
    ),
    "accumulation": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        f"the launcher says gradient_accumulation_steps=4 but the recipe makes it 2 (train.global_batch_size=12); {OWNED}",
    ),
    "stage": (
        {STAGE: "3"},
        "the accelerate configuration says zero_stage=3 and {file} zero_optimization.stage=2; leave zero_stage out: "
        + BESIDE,
    ),
    "offload": (
        {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"},
        "the accelerate configuration says offload_optimizer_device=none and {file} "
        f'zero_optimization.offload_optimizer.device="cpu"; leave offload_optimizer_device out: {BESIDE}',
    ),
    "gather": (
        {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
        "the accelerate configuration says zero3_save_16bit_model=true and {file} "
        "zero_optimization.stage3_gather_16bit_weights_on_model_save=null; "
        f"leave zero3_save_16bit_model out: {BESIDE}",
    ),
}


def problems(environment, two, tmp_path, device="cpu"):
    config = recipe.build(recipe_values(tmp_path, train={"mixed_precision": "no"}))
    found = launched({**ASKED, FILE: two})
    return launch_problems(environment, found, config, world_size=2, gradient_accumulation_steps=2, device=device)


@pytest.mark.parametrize(("environment", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_launcher_that_says_otherwise(environment, message, two, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_launch, "installed", lambda: True)
    assert problems({**GOOD, **environment}, two, tmp_path) == [message.replace("{file}", two)]


def test_a_launch_that_is_right(two, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_launch, "installed", lambda: True)
    assert problems(GOOD, two, tmp_path) == []
    assert problems({key: value for key, value in GOOD.items() if key != "DS_ACCELERATOR"}, two, tmp_path) == []
    agreeing = {"ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    assert problems({**GOOD, **agreeing}, two, tmp_path) == []
    on_gpu = {key: value for key, value in GOOD.items() if key != "DS_ACCELERATOR"}
    assert problems(on_gpu, two, tmp_path, device="cuda") == []


def test_a_machine_that_is_not_ready(two, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_launch, "installed", lambda: False)
    absent, launcher = problems(ASKED, two, tmp_path)
    assert "is not installed; pip install 'clm-dist[deepspeed]'" in absent
    assert "needs a launcher, for one process too" in launcher
    (trial,) = problems(GOOD, two, tmp_path, device="cuda")[1:]
    assert trial == "DS_ACCELERATOR=cpu but the run is on cuda; unset it in the environment"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero_multi_node"])
def test_what_accelerates_launcher_sets_for_the_shipped_configurations(name, tmp_path, monkeypatch):
    """Its own parser and its own environment, without starting anything."""
    from accelerate.commands import launch

    seen = {}
    monkeypatch.setattr(launch, "deepspeed_launcher", lambda args: seen.update(args=args))
    several = ["--num_machines", "1"] if name == "zero_multi_node" else []
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    parser = launch.launch_command_parser()
    options = ["--config_file", str(path), "--num_processes", "2", "--main_process_port", "0", *several, "train.py"]
    launch.launch_command(parser.parse_args(options))
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    _, environment = prepare_deepspeed_cmd_env(seen["args"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(deepspeed_launch, "installed", lambda: True)
    found = launched(environment)
    assert found.source.startswith("ds_configs/") and found.values == json.loads((ROOT / found.source).read_text())
    environment |= {"WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    config = recipe.build(recipe_values(tmp_path))
    run = {"world_size": 2, "gradient_accumulation_steps": 1, "device": "cpu"}
    assert launch_problems(environment, found, config, **run) == []
