"""Runs as Slurm jobs: what many nodes learn is what one learns, and a run that is interrupted in every way is one run."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import (
    SCRIPT,
    command,
    faulty,
    job,
    log,
    losses,
    rows,
    run,
    slow,
    status,
    steps_of_start,
    submit,
    wait_for,
    wait_until_over,
)  # fmt: skip
from conftest import BIN, ROOT, read_rows
from local_wandb import LocalWandb, check_arrived, only

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from crash import Start, compare, prepare

from clm_dist.cluster.batch import seconds

pytestmark = pytest.mark.cluster
TWO_NODES = ("--nodes", 2, "--processes-per-node", 1)
ONE_NODE = ("--nodes", 1, "--processes-per-node", 2)


@pytest.fixture(scope="session", autouse=True)
def slurm():
    """Up while the tests last."""
    folder = f"/tmp/clm-dist-slurm-{os.getpid()}"
    environment = {**os.environ, "CLM_DIST_SLURM": folder}
    started = subprocess.run([SCRIPT, "start"], env=environment, capture_output=True, text=True, check=False)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip().splitlines()[-1])
    assert started.returncode == 0, started.stderr
    os.environ.update(CLM_DIST_SLURM=folder, SLURM_CONF=f"{folder}/slurm.conf")
    yield
    run(SCRIPT, "stop", env=environment)
    del os.environ["SLURM_CONF"], os.environ["CLM_DIST_SLURM"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A recipe in which much happens, and its data; on a disk that both nodes see."""
    folder = tmp_path_factory.mktemp("cluster")
    prepare(folder, 80)
    return folder


@pytest.fixture
def wandb(monkeypatch):
    """A W&B that the jobs reach; `submit` hands its environment on to them."""
    pytest.importorskip("wandb")
    with LocalWandb() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_two_nodes_learn_what_one_node_does(folder):
    """DDP and ZeRO-2, four jobs at once on the same two nodes: none takes the port of another."""
    few = ("train.max_steps=12",)
    before = run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600").strip()
    runs = {
        (engine, nodes[1]): submit(
            folder / "recipe.yaml", f"run_dir={folder}/{engine}-{nodes[1]}", *few, *nodes, "--config", engine, *extra
        )
        for engine, nodes, extra in (
            ("ddp", TWO_NODES, ("--stage",)), ("ddp", ONE_NODE, ()), ("zero2", TWO_NODES, ()), ("zero2", ONE_NODE, ()),
        )
    }  # fmt: skip
    run("scancel", before)  # now all begin
    assert wait_until_over(*runs.values()) == ["COMPLETED"] * 4, [log(folder / f"{e}-{n}") for e, n in runs]
    for engine in ("ddp", "zero2"):
        two, one = folder / f"{engine}-2", folder / f"{engine}-1"
        assert losses(two) == losses(one) and len(losses(two)) >= 5
        assert job(runs[engine, 2])["NodeList"] == "n[1-2]" and job(runs[engine, 1])["NumNodes"] == "1"
        facts = json.loads((two / "environment.json").read_text())
        assert (
            facts["processes"] == 2 and facts["distributed_type"] == {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED"}[engine]
        )
    for first, second in zip(losses(folder / "ddp-2"), losses(folder / "zero2-2"), strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    staged = log(folder / "ddp-2")
    assert staged.count("verified") == 2, staged  # once on each node
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"clm-dist-{runs['ddp', 2]}-*"))  # and taken away
    starts = [rows(folder / f"{engine}-{nodes}", "start")[0]["began"] for engine, nodes in runs]
    ends = [rows(folder / f"{engine}-{nodes}", "end")[0]["time"] for engine, nodes in runs]
    assert max(starts) < min(ends), "they were not there at once"


def test_a_run_that_is_interrupted_in_every_way_is_one_run(folder, tmp_path, wandb):
    """By a signal, by requeueing, by the time limit; then a rank is killed: one ledger, one W&B run, all the same bits."""
    reference = Start(folder / "recipe.yaml", tmp_path / "reference", 2)
    folder_of_run = tmp_path / "run"
    recipe, run_dir = folder / "recipe.yaml", f"run_dir={folder_of_run}"
    tracked = ("track.trackers=[wandb]", *TWO_NODES)
    number = submit(recipe, run_dir, *tracked, "--signal", 1, "--preemptible", *slow(tmp_path / "slow"))
    assert reference.wait(300) == 0, reference.log.read_text()

    def reached(start):
        return wait_for(lambda: steps_of_start(folder_of_run, start) >= 2, f"start {start}: {log(folder_of_run)}", 300)

    reached(0)
    found = status(folder_of_run)
    assert found["state"] == "running" and found["job"]["nodes"] == "n[1-2]" and found["max_steps"] == 80
    run("scancel", "--signal=USR1", "--batch", number)
    wait_for(lambda: rows(folder_of_run, "end"), "the run to save and leave", 300)
    assert [row["state"] for row in rows(folder_of_run, "end")] == ["preempted"]
    reached(1)
    run("scontrol", "requeue", number)
    reached(2)
    soon = (
        seconds(job(number)["RunTime"].rpartition("-")[2]) + 40
    )  # Slurm looks every half minute, and counts in minutes
    run("scontrol", "update", f"jobid={number}", f"timelimit={soon // 60 + 1}")
    wait_for(lambda: job(number)["Restarts"] == "3", "the signal before the time limit", 150)
    run("scontrol", "update", f"jobid={number}", "timelimit=240")
    reached(3)
    [rank, *_] = pids_of(folder_of_run, rank=1)
    os.kill(rank, signal.SIGKILL)
    assert wait_until_over(number) == ["FAILED"] and job(number)["Restarts"] == "3"  # a failure is not queued again
    found = status(folder_of_run)
    assert found["state"] == "failed" and re.match(
        "rank 1 of 2 on n2, training at step .*: (its process is gone|no sign of life)", found["detail"]
    ), found
    (tmp_path / "slow").unlink()
    number = submit(recipe, run_dir, *tracked)
    assert wait_until_over(number) == ["COMPLETED"], log(folder_of_run)
    assert compare(folder_of_run, tmp_path / "reference") == []  # weights, metrics, what was learned from; and `verify`
    assert len(rows(folder_of_run, "start")) == 5
    found = status(folder_of_run)
    assert found["state"] == "finished" and found["step"] == 80 and found["starts"] == 5 and not found["outbox"]
    check_arrived(wandb, folder_of_run, computed_again=True)
    there = only(wandb)
    print(f"W&B: one run, {there.name}, opened {there.opened} times, {len(there.history)} rows, {there.state}")
    print(log(folder_of_run), command("status", folder_of_run), command("verify", folder_of_run))


def pids_of(folder, rank):
    """The process of a rank, as it says itself."""
    return [json.loads((folder / ".watch" / f"rank-{rank:05d}.json").read_text())["pid"]]


def test_what_is_queued_again_and_what_is_not(folder, tmp_path):
    """Saved: at most so many times. Misconfigured, cancelled, or failed: never."""
    recipe = folder / "recipe.yaml"
    limited = submit(recipe, f"run_dir={tmp_path}/limited", "train.stop_after=1", *ONE_NODE, "--requeue", 1)
    cancelled = submit(recipe, f"run_dir={tmp_path}/cancelled", *ONE_NODE, "--preemptible", *slow(tmp_path / "slow"))
    # rank 0 is then told to end, and leaves as one that has nothing to save
    killed = submit(recipe, f"run_dir={tmp_path}/killed", *ONE_NODE, "--preemptible", *faulty("CLM_DIST_KILLED=1"))
    # as it is shipped, and with a batch that two processes cannot share
    misconfigured = run(
        *("sbatch", "--parsable", "--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2", f"--output={tmp_path}/%j.log"),
        *("launch/preemptible.sbatch", recipe, f"run_dir={tmp_path}/misconfigured", "train.global_batch_size=7"),
        env={**os.environ, "OUTCOMES": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"},
    ).strip()
    wait_for(lambda: steps_of_start(tmp_path / "cancelled", 0) >= 1, "a step", 300)
    run("scancel", cancelled)
    over = wait_until_over(limited, cancelled, misconfigured, killed)
    assert over == ["FAILED", "CANCELLED", "FAILED", "FAILED"], log(tmp_path / "limited")
    assert job(limited)["ExitCode"] == "75:0" and job(limited)["Restarts"] == "1"
    assert [row["state"] for row in rows(tmp_path / "limited", "end")] == ["preempted", "preempted"]
    assert job(cancelled)["Restarts"] == "0" and rows(tmp_path / "cancelled", "end")[0]["state"] == "preempted"
    assert status(tmp_path / "cancelled")["state"] == "saved"
    assert job(killed)["ExitCode"] == "1:0" and job(killed)["Restarts"] == "0", log(tmp_path / "killed")
    text = (tmp_path / f"{misconfigured}.log").read_text()
    assert job(misconfigured)["ExitCode"] == "2:0" and job(misconfigured)["Restarts"] == "0", text
    assert text.count("train.global_batch_size=7 is not divisible by") == 1
    assert not list(tmp_path.glob("outcome-*"))


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sbatch")), ids=lambda path: path.name)
def test_slurm_takes_what_is_shipped(path):
    array = ["--array=0-2"] if "--array" in path.read_text() else []
    done = subprocess.run(
        ["sbatch", "--test-only", *array, path, "recipe.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def test_slurm_takes_what_the_page_says(folder, tmp_path, monkeypatch):
    """Each command of docs/slurm.md that submits, as far as Slurm's answer to it."""
    for name in ("recipes", "accelerate_configs", "ds_configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    command("prepare", "recipes/demo.yaml")
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "slurm.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in "".join(blocks).splitlines()]
    assert len(lines) == 13
    for program, *arguments in lines:
        if program == "sbatch":
            done = subprocess.run([program, "--test-only", *arguments], capture_output=True, text=True, check=False)
        elif arguments[0] == "submit":
            text = command(*arguments, *(() if "--dry-run" in arguments else ("--dry-run",)))
            done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, check=False)
        else:
            continue
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def test_arrays_prepare_in_shards_and_try_settings(folder, tmp_path):
    prepared = tmp_path / "prepared"
    recipe, run_dir = folder / "recipe.yaml", f"run_dir={tmp_path}/sweep"
    number = submit(recipe, run_dir, f"data.prepared_dir={prepared}", "--prepare", 2, "--time", "0:05:00")
    wait_until_over(f"{number}_0", f"{number}_1")
    assert (prepared / "manifest.json").read_bytes(), log(tmp_path / "sweep" / "slurm" / "prepare")
    number = submit(
        recipe, run_dir, f"data.prepared_dir={prepared}", "train.max_steps=3", "optim.warmup_steps=1",
        "--array", "optim.lr=1e-3,3e-3",
        "--processes-per-node", 1,
    )  # fmt: skip
    assert wait_until_over(f"{number}_0", f"{number}_1") == ["COMPLETED"] * 2, log(tmp_path / "sweep")
    found = status(tmp_path / "sweep")
    assert [one["state"] for one in found] == ["finished", "finished"]
    rates = [max(row.get("train/lr", 0) for row in read_rows(tmp_path / "sweep" / n / "metrics.jsonl")) for n in "01"]
    assert rates[1] == pytest.approx(3 * rates[0])
