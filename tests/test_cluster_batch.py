"""Batch files: what is asked of Slurm, refused with all its problems, and the same template for launch/."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import BIN, ROOT, recipe_values, write_recipe

from clm_dist.cli import main
from clm_dist.cluster.batch import Resources, seconds
from clm_dist.cluster.shipped import shipped
from clm_dist.cluster.topology import read_topology
from clm_dist.errors import UserError


@pytest.fixture
def prepared(trained, tmp_path):
    """A recipe over data that is prepared, for a run that has not begun."""
    values = yaml.safe_load((trained / "recipe.yaml").read_text())
    return write_recipe(tmp_path / "recipe.yaml", {**values, "run_dir": str(tmp_path / "run")})


def dry_run(capsys, *arguments):
    code = main(["submit", *map(str, arguments), "--dry-run"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def directives(text):
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def check_script(text, tmp_path):
    path = tmp_path / "checked.sbatch"
    path.write_text(text)
    done = subprocess.run([BIN / "shellcheck", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert text.count("\n") < 60


def test_what_is_shipped_is_what_is_generated():
    """`python -m clm_dist.cluster.shipped launch` after a change of the template."""
    assert {path.name: path.read_text() for path in (ROOT / "launch").glob("*.sbatch")} == shipped()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_what_is_shipped_is_read_by_a_tired_person(name):
    lines = (ROOT / "launch" / name).read_text().splitlines()
    assert (
        lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# Usage: sbatch ") and f"launch/{name}" in lines[1]
    )
    assert "set -euo pipefail" in lines
    assert sum("-m clm_dist train" in line or "clm-dist prepare" in line for line in lines) == 1


def test_a_batch_file(prepared, tmp_path, capsys):
    code, text, _ = dry_run(
        capsys, prepared, "optim.lr=0.5", "--nodes", 2, "--gpus-per-node", 2, "--time", "4:00:00", "--cpus-per-task", 8,
        "--partition", "gpu", "--account", "us", "--qos", "low", "--mem", "200G", "--requeue", 3, "--config", "zero2",
        "--setup", "module load cuda", "--stage",
    )  # fmt: skip
    assert code == 0
    folder = tmp_path / "run" / "slurm"
    assert directives(text) == {
        "job-name": "run", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "2", "cpus-per-task": "8", "mem": "200G",
        "time": "4:00:00", "partition": "gpu", "account": "us", "qos": "low", "signal": "B:USR1@120",
        "output": f"{folder}/job-%j.log", "open-mode": "append", "requeue": "", "chdir": str(Path.cwd()),
    }  # fmt: skip
    for line in (f"CONFIG={folder}/zero2.yaml", "PROCESSES_PER_NODE=2", "MAX_REQUEUES=3", "module load cuda"):
        assert line in text.splitlines()
    prepared_dir = yaml.safe_load(prepared.read_text())["data"]["prepared_dir"]
    assert f"STAGE={prepared_dir}" in text.splitlines()
    assert f"-m clm_dist train {folder}/recipe.yaml &" in text
    assert not (tmp_path / "run").exists()  # a dry run writes nothing
    check_script(text, tmp_path)


def test_without_requeue_there_is_none(prepared, tmp_path, capsys):
    code, text, _ = dry_run(capsys, prepared, "--processes-per-node", 2)
    assert code == 0 and "scontrol requeue" not in text and "MAX_REQUEUES" not in text
    assert "gpus-per-node" not in directives(text) and directives(text)["cpus-per-task"] == "2"
    check_script(text, tmp_path)


def test_a_sweep_has_a_run_for_each_combination(prepared, tmp_path, capsys):
    arguments = ("--processes-per-node", 1, "--array", "optim.lr=1e-3,1e-4", "--array", "seed=1,2,3")
    code, text, _ = dry_run(capsys, prepared, *arguments)
    assert code == 0 and directives(text)["array"] == "0-5"
    check_script(text, tmp_path)
    assert dry_run(capsys, prepared, "--processes-per-node", 1, "--array", "optim.lr=-1,1")[0] == 2


def test_prepare_in_shards_needs_no_model(tmp_path, capsys):
    values = recipe_values(tmp_path)
    del values["model"], values["train"]
    code, text, _ = dry_run(capsys, write_recipe(tmp_path / "r.yaml", values), "--prepare", 4, "--cpus-per-task", 16)
    assert code == 0 and directives(text)["array"] == "0-3" and "signal" not in directives(text)
    assert '--shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"' in text
    check_script(text, tmp_path)


def test_every_problem_at_once(prepared, tmp_path, capsys):
    code, out, err = dry_run(
        capsys, prepared, "optim.lr=-1", "--nodes", 0, "--time", "soon", "--mem", "much", "--partition", "a b", "--config",
        "zero9", "--array", "seed=1, 2", "--requeue", 0,
    )  # fmt: skip
    assert code == 2 and not out
    for needle in (
        "--nodes 0 is too small; give 1 or more",
        "how many processes? Give --gpus-per-node G, or, on nodes without GPUs, --processes-per-node P",
        "--time soon is no time; write H:MM:SS",
        "--mem much is no size",
        "--partition 'a b' is no name",
        "--config zero9: no such file",
        "--array seed=1, 2 is no list of settings",
        "--requeue 0 is too small",
        "optim.lr=-1: input should be greater than 0",
    ):
        assert needle in err, needle
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("train.global_batch_size=7", "--processes-per-node", 2), "=7 is not divisible by 2 processes"),
        (("--nodes", 4, "--gpus-per-node", 8), "=12 is not divisible by 32 processes"),
        (("data.prepared_dir=nowhere", "--processes-per-node", 1), "nowhere holds no prepared data"),
        (("--gpus-per-node", 2, "--processes-per-node", 3), "each GPU has one process"),
        (("--processes-per-node", 1, "--signal", 7200, "--time", "2:00:00"), "--signal 7200 is not before --time"),
        (("--prepare", 2, "--stage"), "--stage means nothing to --prepare"),
    ],
)
def test_what_the_job_would_meet_is_refused_before_it(prepared, capsys, arguments, needle):
    code, _, err = dry_run(capsys, prepared, *arguments)
    assert code == 2 and needle in err


def test_without_slurm_it_says_so(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(prepared), "--processes-per-node", "2"]) == 2
    assert "there is no sbatch here; submit from a login node" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def fake_slurm(folder, monkeypatch, refuses=False):
    """Commands that answer as Slurm does, and keep what they were given."""
    folder.mkdir()
    scripts = {
        "sbatch": f'if [ "$1" = --test-only ]; then cat > {folder}/tested; exit {int(refuses)}; fi\n'
        f'echo "$@" > {folder}/submitted; echo "12;cluster"\n',
        "scontrol": 'echo "JobId=12 JobState=PENDING Reason=Priority NodeList=(null) Restarts=0"\n',
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_later_edit_changes_nothing_of_a_waiting_job(prepared, tmp_path, capsys, monkeypatch):
    fake_slurm(tmp_path / "bin", monkeypatch)
    arguments = [
        "submit",
        str(prepared),
        "optim.lr=0.25",
        "--nodes",
        "2",
        "--processes-per-node",
        "2",
        "--config",
        "zero2",
    ]
    assert main(arguments) == 0
    folder, out = tmp_path / "run" / "slurm", capsys.readouterr().out
    assert "job 12 is in the queue" in out and f"tail -F {folder}/job-12.log" in out
    names = {"about.json", "job.json", "job.sbatch", "recipe.yaml", "zero2.json", "zero2.yaml"}
    assert {path.name for path in folder.iterdir()} == names
    assert (tmp_path / "bin" / "submitted").read_text() == f"--parsable {folder}/job.sbatch\n"
    assert (tmp_path / "bin" / "tested").read_text() == (folder / "job.sbatch").read_text()
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["optim"]["lr"] == 0.25
    topology = yaml.safe_load((folder / "zero2.yaml").read_text())
    assert topology["num_machines"] == 2 and topology["num_processes"] == 4
    assert topology["deepspeed_config"]["deepspeed_config_file"] == f"{folder}/zero2.json"
    assert topology["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert json.loads((folder / "zero2.json").read_text()) == json.loads((ROOT / "ds_configs/zero2.json").read_text())
    about = json.loads((folder / "about.json").read_text())
    assert about["versions"]["clm-dist"] and "commit" in about
    assert main(["status", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run: waiting (in the queue)\n  job 12 PENDING, Priority\n"
    assert main(arguments) == 2  # while it waits
    assert "is in the queue and reads" in capsys.readouterr().err


def test_what_slurm_refuses_is_told_and_nothing_is_written(prepared, tmp_path, capsys, monkeypatch):
    fake_slurm(tmp_path / "bin", monkeypatch, refuses=True)
    assert main(["submit", str(prepared), "--processes-per-node", "2"]) == 2
    assert "Slurm refuses the job" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_times_in_slurms_notation():
    expected = {"90": 5400, "90:30": 5430, "4:00:00": 14400, "1-0": 86400, "1-2:30": 95400, "1-0:0:5": 86405, "0": 0}
    assert {text: seconds(text) for text in expected} == expected
    assert [seconds(text) for text in ("", "x", "1:2:3:4", "-1", "1-")] == [0] * 5


def test_processes_are_those_of_gpus():
    assert Resources(nodes=3, gpus_per_node=4).world_size == 12
    assert Resources(nodes=3, processes_per_node=2).world_size == 6


@pytest.mark.parametrize("kind", ["MULTI_CPU", "NO", None])
def test_a_topology_that_joins_no_processes_is_refused(tmp_path, kind):
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": kind}))
    with pytest.raises(UserError, match="joins no processes"):
        read_topology(str(path))
