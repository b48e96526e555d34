"""What is shipped beside the code works too: YAML, scripts, packaging, the sentence about secrets."""

import json
import re
import subprocess

import pytest
import yaml
from conftest import BIN, ROOT, run_command

SCRIPTS = sorted([*(ROOT / "launch").glob("*.s*"), ROOT / ".ci" / "run"])
SLURM = ROOT / "tests" / "cluster" / "slurm.sh"
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
OF_DEEPSPEED = [path for path in CONFIGS if path.name.startswith("zero")]
DEEPSPEED_FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", [*SCRIPTS, SLURM], ids=lambda path: path.name)
def test_scripts(path):
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    shellcheck = subprocess.run([BIN / "shellcheck", path], capture_output=True, text=True, check=False)
    assert shellcheck.returncode == 0, shellcheck.stdout
    assert "set -euo pipefail" in text and (path == SLURM or text.count("\n") < 60)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_configs_say_where_and_never_what(path):
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))
    values = yaml.safe_load(path.read_text())
    owned_by_the_recipe = {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping", "downcast_bf16"}
    assert not owned_by_the_recipe & set(values)
    assert values["distributed_type"] != "MULTI_CPU"  # which would start one process
    assert path.read_text().startswith("#")


@pytest.mark.parametrize("path", OF_DEEPSPEED, ids=lambda path: path.name)
def test_configs_for_deepspeed_name_a_file_and_repeat_nothing_of_it(path):
    values = yaml.safe_load(path.read_text())
    assert values["distributed_type"] == "DEEPSPEED"
    assert "use_cpu" not in values  # with which Accelerate drops DeepSpeed in silence
    section = values["deepspeed_config"]
    assert set(section) <= {"deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher"}
    assert section["zero3_init_flag"] is False
    file = ROOT / section["deepspeed_config_file"]
    assert file in DEEPSPEED_FILES
    if path.stem != "zero_multi_node":
        assert file.stem == path.stem


def test_the_config_for_fsdp():
    values = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    assert values["distributed_type"] == "FSDP"
    assert values["fsdp_config"] == {"fsdp_version": 2}  # nobody reads another key


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.name)
def test_deepspeed_files_hold_choices_of_zero_and_leave_every_number_of_the_recipe_to_it(path):
    values = json.loads(path.read_text())
    zero = values.pop("zero_optimization")
    assert values == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }
    assert path.stem.startswith(f"zero{zero['stage']}")
    assert f"`{path.name}`" in (ROOT / "docs" / "sharding.md").read_text()


def test_local_sh_says_how_to_use_it():
    done = subprocess.run(["bash", ROOT / "launch" / "local.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Usage: launch/local.sh RECIPE" in done.stderr


# what an environment does without: trackio needs a newer huggingface_hub than transformers 4.57 takes
CONSTRAINTS = {"constraints.txt": set(), "constraints-legacy.txt": {"trackio"}}


@pytest.mark.parametrize(("file", "without"), CONSTRAINTS.items(), ids=list(CONSTRAINTS))
def test_every_dependency_is_pinned(file, without):
    project = (ROOT / "pyproject.toml").read_text()
    names = {plain(name) for name in re.findall(r'"([A-Za-z][\w-]*)>=[\d.]+(?:,[<!][\d.=*]+)*"', project)}
    assert {"torch", "transformers", "huggingface-hub", "peft", "lm-eval"} <= names
    names |= {"types-pyyaml", "types-tqdm"}
    names.discard("setuptools")
    text = (ROOT / file).read_text()
    pins = {plain(line.split("==")[0]) for line in text.splitlines() if "==" in line and not line.startswith("#")}
    assert names - pins == without
    assert "torch==2.13.0" in text


def plain(name):
    return name.lower().replace("_", "-")


def test_the_two_environments_differ_in_what_transformers_takes_and_in_nothing_else():
    shared, legacy = (
        dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if re.match(r"\w[\w.-]*==", line))
        for file in CONSTRAINTS
    )
    differ = {name for name in shared.keys() & legacy.keys() if shared[name] != legacy[name]}
    assert differ == {"transformers", "tokenizers", "huggingface_hub", "datasets", "fsspec"}


def test_templates_are_packaged():
    assert (
        'clm_dist = ["publish/templates/*", "cluster/templates/*", "model/proved/*"]'
        in (ROOT / "pyproject.toml").read_text()
    )


def test_a_misspelt_key_shows_the_way(tmp_path):
    done = run_command("train", ROOT / "recipes" / "demo.yaml", "train.epoch=1")
    assert done.code == 2 and "unknown key train.epoch; did you mean train.epochs?" in done.err


def test_the_repository_speaks_of_the_project_alone():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in filter(None, tracked.split("\0")):
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
        if name != "tests/test_shipped.py":
            assert "/work/" not in text and "/root/" not in text, name
