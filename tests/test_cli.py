"""The door: instant help, exit codes, one message for bad input."""

import os
import subprocess
import sys
import time

import pytest
from conftest import BIN, prepare_recipe, recipe_values, run_command, write_recipe

from clm_dist.cli import PATIENCE, main, parse
from clm_dist.commands import CHAPTERS, function_of
from clm_dist.commands.table import COMMANDS
from clm_dist.errors import ConfigError, nearest

HEAVY = {"torch", "transformers", "datasets", "accelerate", "evaluate", "pandas", "matplotlib", "wandb"}
SCRIPT = """
import sys
from clm_dist.cli import main
try: code = main(sys.argv[2:])
except SystemExit as left: code = left.code
found = sorted(set(sys.argv[1].split(",")) & set(sys.modules))
assert not found, f"imported: {found}"
sys.exit(code)
"""


def lightly(*arguments, without=HEAVY, **environment):
    """A command in a process of its own that imports none of these, whatever comes of it."""
    command = [sys.executable, "-c", SCRIPT, ",".join(without), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert "imported: [" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_torch(command):
    settings = COMMANDS[command][1] == "RECIPE" if command else False
    without = HEAVY | {"numpy", "pyarrow"} | (set() if settings else {"pydantic", "yaml", "jinja2"})
    done = lightly(*command.split(), "--help", without=without)
    assert done.returncode == 0, done.stderr
    assert "usage: clm-dist" in done.stdout
    assert ("data.block_size  (int, >= 2, default 128)" in done.stdout) is settings


@pytest.mark.parametrize(
    ("command", "settings", "needle"),
    [
        ("train", ["train.max_stepss=3"], "unknown key train.max_stepss; did you mean train.max_steps?"),
        ("prepare", ["data.block_size=x"], "data.block_size='x': input should be a valid integer"),
        ("evaluate", ["nowhere.key=1"], "unknown key nowhere"),
        ("plan", ["model.type=null", "--gpus=2", "--gpu-memory=80"], "set one of them: a name to load, or a type"),
        ("check", ["optim.schedule=wsd"], "decay_steps is for wsd, which needs it"),
        ("submit", ["optim.lr=-1", "--processes-per-node=2"], "optim.lr=-1: input should be greater than 0"),
        ("plan", ["--gpus=0", "--gpu-memory=80"], "--gpus 0 is not possible; give a number above 0"),
    ],
)
def test_a_wrong_configuration_imports_no_torch(tmp_path, command, settings, needle):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path))
    done = lightly(command, recipe, *settings, without=HEAVY | {"numpy", "pyarrow"})
    assert done.returncode == 2 and needle in done.stderr, done.stderr


def test_a_recipe_that_is_not_there_imports_no_torch(tmp_path):
    done = lightly("train", tmp_path / "no.yaml", without=HEAVY | {"numpy", "pyarrow"})
    assert done.returncode == 2 and "no recipe at" in done.stderr, done.stderr


def test_a_wrong_start_imports_no_torch(tmp_path):
    recipe = prepare_recipe(tmp_path, 40)
    nothing = tmp_path / "nothing"
    for arguments, needle in (
        (
            ("train", recipe, f"data.prepared_dir={nothing}"),
            "holds no prepared data; run `clm-dist prepare RECIPE` first",
        ),
        (("train", recipe, "data.block_size=32"), "was prepared with data.block_size=16, the recipe says 32"),
        (("train", recipe, f"run_dir={recipe}"), "cannot be a folder"),
        (("train", recipe, "train.global_batch_size=100000"), "are fewer than one step's"),
        (("train", recipe, "model.type=null", f"model.name={nothing}"), f"there is no folder {nothing}"),
        (("train", recipe, "train.resume_changes=[optim.lrr]"), "which is no field; did you mean optim.lr?"),
        (("evaluate", recipe), "does not exist; train first"),
        (("prepare", recipe, f"data.source={nothing}.jsonl", f"data.prepared_dir={nothing}"), "does not exist"),
        (("generate", nothing, "--prompt=a"), f"there is no folder {nothing}"),
        (("report", nothing), "give the folder of a run"),
        (("verify", nothing), "has no ledger.jsonl"),
    ):
        done = lightly(*arguments)
        assert done.returncode == 2 and needle in done.stderr, done.stderr
    done = lightly("train", recipe, WORLD_SIZE="5")
    assert done.returncode == 2 and "is not divisible by 5 processes" in done.stderr


def test_every_command_has_its_function():
    assert set(CHAPTERS) == set(COMMANDS)
    assert all(callable(function_of(command)) for command in COMMANDS)


def test_overrides_may_stand_anywhere():
    expected = ["data.block_size=3", "seed=1"]
    for line in ("train R data.block_size=3 --overwrite seed=1", "train --overwrite R data.block_size=3 seed=1"):
        args = parse(line.split())
        assert (args.recipe, args.overrides, args.overwrite) == ("R", expected, True)


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["train"], "the following arguments are required: RECIPE"),
        (["trian", "x"], "invalid choice: 'trian'"),
        (["train", "R", "--overwite"], "unknown argument --overwite; did you mean --overwrite?"),
        (["prepare", "R", "--workes=2"], "unknown argument --workes=2; did you mean --workers?"),
        (["train", "R", "--data.block_size=3"], "unknown argument --data.block_size=3; settings are written"),
        (["report", "RUN", "a=b"], "unknown argument a=b"),
    ],
)
def test_a_wrong_command_line(arguments, needle, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert needle in capsys.readouterr().err


def test_every_problem_of_a_recipe_in_one_message(tmp_path, capsys):
    values = recipe_values(tmp_path, data={"blok_size": 3}, train={"epochs": 2})
    code = main(["train", str(write_recipe(tmp_path / "r.yaml", values)), "optim.lr=-1"])
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("clm-dist train:\n- ")
    for needle in (
        "did you mean data.block_size?",
        "optim.lr=-1: input should be greater than 0",
        "train.epochs=2.0 and",
    ):
        assert needle in err


def test_module_and_script_are_the_same_door():
    module = run_command("--version")
    script = subprocess.run([BIN / "clm-dist", "--version"], capture_output=True, text=True)
    assert module.out == script.stdout and module.code == script.returncode == 0


def test_the_first_rank_speaks_and_the_others_wait_for_it(tmp_path):
    """The launcher ends all when one fails: a rank that failed faster would end the one with the message."""
    started = time.monotonic()
    first = run_command("train", tmp_path / "none.yaml", env={"LOCAL_RANK": "0"})
    assert first.code == 2 and first.err.startswith("clm-dist train: error: no recipe at")
    assert time.monotonic() - started < PATIENCE
    other = run_command("train", tmp_path / "none.yaml", env={"LOCAL_RANK": "1", "RANK": "9"})
    assert other.code == 2 and other.err.startswith("[rank 9] clm-dist train: error: no recipe at")
    assert time.monotonic() - started > PATIENCE


def test_nearest():
    assert nearest("blok_size", ["block_size", "seed"]) == "; did you mean block_size?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", []) == ""
    assert str(ConfigError(["one", "two"])) == "- one\n- two"
    assert str(ConfigError(["one"])) == "one"
