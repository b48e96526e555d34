"""The door: instant help, exit codes, one message for bad input."""

import subprocess
import sys
import time

import pytest
from conftest import BIN, recipe_values, run_command, write_recipe

from clm_dist.cli import PATIENCE, main, parse
from clm_dist.errors import ConfigError, nearest


@pytest.mark.parametrize("command", ["", "prepare", "plan", "train", "evaluate", "generate", "report", "push"])
def test_help_imports_no_torch(command):
    script = (
        "import sys; from clm_dist.cli import parse\n"
        "try: parse(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = [command, "--help"] if command else ["--help"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: clm-dist" in done.stdout
    if command in ("prepare", "plan", "train", "evaluate"):
        assert "data.block_size  (int, >= 2, default 128)" in done.stdout


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
