"""Interrupted and started again, in one process: what a start goes on from, what it refuses, and how it leaves."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY_MODEL, read_rows, recipe_values, run_command, write_documents, write_recipe
from safetensors.numpy import load_file

DROPOUT = {**TINY_MODEL["config"], "resid_pdrop": 0.2, "embd_pdrop": 0.2}
SAMPLES = {"prompts": ["the cat"], "max_new_tokens": 8}


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory):
    """A recipe with dropout, its data, and a run of it that nothing interrupted: `whole`."""
    folder = tmp_path_factory.mktemp("resume")
    write_documents(folder / "texts.jsonl")
    sections = {"model": {"type": "gpt2", "config": DROPOUT}, "evaluate": {"every_steps": 6}, "optim": {"lr": 1e-2}}
    train = {"max_steps": 20, "global_batch_size": 12, "micro_batch_size": 4, "log_every": 3}
    checkpoint = {"save_every": 5, "keep_last": 9, "asynchronous": False}
    values = recipe_values(folder, **sections, checkpoint=checkpoint, train=train, generate=SAMPLES)
    write_recipe(folder / "recipe.yaml", {**values, "run_dir": str(folder / "whole")})
    for name in ("prepare", "train"):
        done = command(name, folder / "recipe.yaml")
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """A run as it was after step 10: the whole one without what came later. Returns its folder."""
    run = tmp_path / "run"
    shutil.copytree(folder / "whole", run)
    for step in (15, 20):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(run / "model")
    return run


@pytest.fixture
def train(command, folder):
    """train(run, *overrides): of the recipe in that folder."""
    return lambda run, *overrides: command("train", folder / "recipe.yaml", f"run_dir={run}", *overrides)


def figures(run):
    """The rows of metrics without times."""
    rows = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows]


def assert_same(run, whole):
    first, second = (load_file(one / "model" / "model.safetensors") for one in (run, whole))
    assert all(first[name].tobytes() == second[name].tobytes() for name in second)
    assert figures(run) == figures(whole)
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_a_resumed_run_is_the_one_that_never_stopped(command, train, folder, run):
    """Rows and samples past the restored step were there: they are cut, and come again."""
    done = train(run)
    assert done.code == 0, done.err
    assert f"resumed at step 10 from {run}/checkpoints/step-00000010 (1 processes then, 1 now)" in done.out
    assert_same(run, folder / "whole")
    verified = command("verify", run)
    assert verified.code == 0, verified.err
    # 20 steps of 12 blocks; the copied ledger knows that it was at step 20 before
    assert "20 steps in 2 starts read 240 blocks" in verified.out and "10 steps were done again" in verified.out
    assert "goodput" in verified.out


def test_what_a_checkpoint_holds(folder):
    checkpoint = folder / "whole" / "checkpoints" / "step-00000010"
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["cursor"], state["world_size"]) == (10, 120, 1)
    assert state["evaluated"] == 6 and state["best_loss"] == state["evaluation"]["eval/loss"]
    assert state["steps"] == 1 and state["tokens"] == 12 * 15  # one step since the log line of step 9
    assert len(state["data"]) == 64 and set(state["trackers"]) == {"wandb", "run_dir"}
    names = {path.name for path in checkpoint.iterdir()}
    shares = {"model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors", "rank-00000.json"}
    assert names == {*shares, "state.json", "config.yaml", "manifest.json", "COMMITTED"}


@pytest.mark.parametrize(
    ("overrides", "needle"),
    [
        (["optim.lr=0.02"], "another configuration: optim.lr: 0.01 -> 0.02"),
        (["seed=1", "optim.beta2=0.9"], "optim.beta2: 0.999 -> 0.9, seed: 42 -> 1"),
        (["train.global_batch_size=24"], "train.global_batch_size: 12 -> 24"),
        (["train.max_steps=30"], "train.max_steps: 20 -> 30"),
        (["model.config.resid_pdrop=0.0"], "model.config.resid_pdrop: 0.2 -> 0.0"),
        (["train.resume_changes=[optim.rl]"], "optim.rl, which is no field; did you mean optim.lr?"),
        (["train.resume=nowhere"], "train.resume=nowhere: there is no such folder; name a whole checkpoint"),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_the_fields(train, folder, run, overrides, needle):
    before = sorted(path.name for path in run.rglob("*"))
    done = train(run, *overrides)
    assert done.code == 2 and needle in done.err and "Traceback" not in done.err, done.err
    assert sorted(path.name for path in run.rglob("*")) == before


def test_other_data_is_refused(command, train, folder, run, tmp_path):
    done = command("prepare", folder / "recipe.yaml", f"data.prepared_dir={tmp_path / 'p'}", "data.eval_fraction=0.3")
    assert done.code == 0
    done = train(run, f"data.prepared_dir={tmp_path / 'p'}", "data.eval_fraction=0.3")
    assert done.code == 2 and "is of other data: data.eval_fraction: 0.2 -> 0.3" in done.err


def test_what_only_says_where_is_taken_and_a_meant_change_too(command, train, folder, run, tmp_path):
    shutil.copytree(folder / "prepared", tmp_path / "elsewhere")
    where = [f"data.prepared_dir={tmp_path / 'elsewhere'}", "train.micro_batch_size=6", "checkpoint.keep_last=1"]
    meant = ["optim.lr=0.02", "train.global_batch_size=24", "train.resume_changes=[optim.lr,train.global_batch_size]"]
    done = train(run, *where, *meant)
    assert done.code == 0, done.err
    verified = command("verify", run)
    assert verified.code == 0 and "20 steps in 2 starts read 360 blocks" in verified.out, verified.err
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000020"]
    rates = {row["step"]: row["train/lr"] for row in read_rows(run / "metrics.jsonl") if "train/lr" in row}
    assert rates[9] == pytest.approx(0.01 * 12 / 20) and rates[12] == pytest.approx(0.02 * 9 / 20)
    assert "lr: 0.02" in (run / "config.yaml").read_text()
    [former] = (run / "configs").iterdir()
    assert former.name.startswith("until-step-00000010") and "lr: 0.01" in former.read_text()


def test_damaged_checkpoints_are_passed_over_and_kept(train, folder, run):
    newest, older = (run / "checkpoints" / f"step-{step:08d}" for step in (10, 5))
    weights = bytearray((newest / "model-00001-of-00001.safetensors").read_bytes())
    weights[-7] ^= 4
    (newest / "model-00001-of-00001.safetensors").write_bytes(weights)
    (run / "checkpoints" / ".step-00000015.partial").mkdir()
    done = train(run)
    assert done.code == 0, done.err
    assert "passed over .step-00000015.partial: half-written: it has no commit mark" in done.out
    assert "passed over step-00000010: model-00001-of-00001.safetensors is damaged: its SHA-256 is not that" in done.out
    assert f"resumed at step 5 from {older}" in done.out
    assert (run / "checkpoints" / "set-aside" / "step-00000010-0").is_dir()
    assert_same(run, folder / "whole")


def test_from_a_named_checkpoint_into_another_folder_and_on_from_there(command, train, folder, tmp_path):
    """The same command again goes on from its own checkpoints, not from the named one."""
    named = folder / "whole" / "checkpoints" / "step-00000005"
    arguments = (tmp_path / "run", f"train.resume={named}")
    done = train(*arguments)
    assert done.code == 0 and f"resumed at step 5 from {named}" in done.out, done.err
    assert (
        load_file(tmp_path / "run/model/model.safetensors").keys()
        == load_file(folder / "whole/model/model.safetensors").keys()
    )
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    again = train(*arguments)
    assert f"resumed at step 15 from {tmp_path}/run/checkpoints" in again.out, again.out + again.err
    assert command("verify", tmp_path / "run").code == 0


def test_overwriting_begins_from_the_named_checkpoint_not_from_what_is_overwritten(command, train, folder, run):
    named = folder / "whole" / "checkpoints" / "step-00000005"
    refused = train(run, f"train.resume={run / 'checkpoints' / 'step-00000005'}", "--overwrite")
    assert refused.code == 2 and "--overwrite would delete" in refused.err
    refused = train(run, f"train.resume={named}", "optim.lr=0.5", "--overwrite")
    assert refused.code == 2 and "optim.lr: 0.01 -> 0.5" in refused.err and (run / "ledger.jsonl").exists()
    done = train(run, f"train.resume={named}", "--overwrite")
    assert done.code == 0 and f"resumed at step 5 from {named}" in done.out, done.err
    assert [row["event"] for row in read_rows(run / "ledger.jsonl")].count("start") == 1
    assert command("verify", run).code == 0


def test_killed_before_the_first_save_begins_again_in_its_folder(train, folder, run):
    shutil.rmtree(run / "checkpoints")
    done = train(run)
    assert done.code == 0 and "resumed" not in done.out, done.err
    assert_same(run, folder / "whole")


def interrupted(folder, run, ask, *overrides):
    """Starts a run, has it asked to stop once it has trained ten steps, and waits; returns exit code and stderr."""
    command = [sys.executable, "-m", "clm_dist", "train", str(folder / "recipe.yaml"), f"run_dir={run}", *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    ledger, end = run / "ledger.jsonl", time.monotonic() + 300
    before = ledger.read_text().count("\n") if ledger.exists() else 0
    while time.monotonic() < end and not (ledger.exists() and ledger.read_text().count("\n") >= before + 10):
        time.sleep(0.01)
    ask(process)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


LONG = (
    "train.max_steps=20000",
    "checkpoint.keep_last=1",
    "checkpoint.save_every=100000",
    "evaluate.every_steps=100000",
)


def test_a_stop_file_saves_leaves_and_is_taken_away(folder, tmp_path):
    run = tmp_path / "run"
    code, err = interrupted(folder, run, lambda _: (run / "STOP").touch(), *LONG)
    assert code == 130 and "stopped by the stop file; saved at step" in err, err  # nothing is to queue it again
    assert not (run / "STOP").exists()
    [saved] = (run / "checkpoints").glob("step-*")
    assert read_rows(run / "ledger.jsonl")[-1]["state"] == "interrupted"
    code, err = interrupted(folder, run, lambda _: (run / "STOP").touch(), *LONG)
    assert code == 130 and not saved.exists()  # it went on


@pytest.mark.slow
@pytest.mark.parametrize("slurm", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_wall_clock_limit(folder, tmp_path, slurm):
    """What was learned is saved before it."""
    environment, run, limit = {}, tmp_path / "run", 25
    if slurm:
        environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + limit)}
    asked = [] if environment else [f"train.stop_after={limit}s"]
    began = time.time()
    done = run_command("train", folder / "recipe.yaml", f"run_dir={run}", *LONG, *asked, env=environment)
    assert done.code == 75 and "stopped by the time limit; saved at step" in done.err, done.err
    [end] = [row for row in read_rows(run / "ledger.jsonl") if row["event"] == "end"]
    assert end["state"] == "preempted" and end["time"] < began + limit  # on a busy machine leaving takes seconds more


def test_two_impatient_interrupts_leave_the_last_checkpoint_whole(command, folder, run):
    """The second one may come in the midst of the save."""

    def twice(process):
        process.send_signal(2)
        time.sleep(0.02)
        process.send_signal(15)
        process.send_signal(10)

    overrides = [*LONG, "train.resume_changes=[train.max_steps]"]
    code, err = interrupted(folder, run, twice, *overrides)
    assert code in (75, 130) and "saved at step" in err
    assert (
        "passed over"
        not in command("train", folder / "recipe.yaml", f"run_dir={run}", *overrides, "train.stop_after=10").out
    )
