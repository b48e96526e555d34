"""`status`: what is said of a run in each of its states, without Slurm; reads only."""

import json
import shutil

import pytest
import yaml
from conftest import run_command

from clm_dist.cli import main
from clm_dist.watch.failure import Failure


@pytest.fixture
def run(trained, tmp_path):
    """A finished run of 30 steps of 12 x 16 tokens."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def status(run, capsys):
    assert main(["status", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def cut(run, rows):
    """As if it had been killed after so many rows of the ledger."""
    path = run / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))


def test_a_finished_run(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found = status(run, capsys)
    assert (found["state"], found["step"], found["max_steps"], found["starts"]) == ("finished", 30, 30, 1)
    assert found["tokens"] == 30 * 12 * 16 and 0 < found["goodput"] < 1 and found["seconds_left"] == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] == [row["train/loss"] for row in rows if "train/loss" in row][-1]
    assert main(["status", str(run)]) == 0
    assert "step 30 of 30 (100.0%), 5,760 tokens, loss " in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_run_that_was_killed(run, capsys):
    cut(run, 12)
    found = status(run, capsys)
    assert found["state"] == "stopped" and 0 < found["step"] < 12 and found["seconds_left"] > 0


def test_time_left_goes_by_the_clock(run, capsys):
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    start, *steps = [row for row in rows if row["event"] in ("start", "step")][:4]
    for number, row in enumerate(steps):  # a step each 10 seconds, whatever it took itself
        row["time"] = start["time"] + 10 * (number + 1)
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (start, *steps)))
    assert status(run, capsys)["seconds_left"] == 10 * (30 - 3)


def test_a_run_that_is_alive(run, capsys):
    cut(run, 12)
    (run / ".watch").mkdir()
    (run / ".watch" / "rank-00000.json").write_text("{}")
    assert status(run, capsys)["state"] == "running"


def test_a_run_that_has_just_left_is_not_running(run, capsys):
    """Its last signs of life are fresh; a sign well after its end is of a new start."""
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "end"
    sign = run / ".watch" / "rank-00000.json"
    sign.parent.mkdir(exist_ok=True)
    sign.write_text("{}")
    for after, state in ((0, "finished"), (10, "running")):
        rows[-1]["time"] = sign.stat().st_mtime - after
        (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert status(run, capsys)["state"] == state


def test_a_run_that_failed(run, capsys):
    cut(run, 12)
    failure = Failure(3, "node7", 1, "training", 9, "out of memory", "", 0.0, 0.0, 8)
    (run / "failure.json").write_text(json.dumps(failure.__dict__))
    found = status(run, capsys)
    assert (found["state"], found["detail"]) == ("failed", "rank 3 of 8 on node7, training at step 9: out of memory")


def test_what_waits_in_the_outbox_is_told(run, capsys):
    """What has not arrived by the destination's own notes, and why; a former problem is none once all is there."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["track"]["trackers"] = ["tensorboard"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "outbox").mkdir(exist_ok=True)
    steps = {json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    left = f"{len(steps)} rows have not arrived (steps 0 to 30)"
    assert status(run, capsys)["outbox"] == {"tensorboard": left}
    notes = run / "outbox" / "tensorboard.json"
    notes.write_text(json.dumps({"problem": "no route"}))
    assert status(run, capsys)["outbox"] == {"tensorboard": f"{left}; no route"}
    notes.write_text(json.dumps({"problem": "no route", "sent": dict.fromkeys(("train", "eval", "samples"), 30)}))
    assert status(run, capsys)["outbox"] == {}


@pytest.mark.parametrize(("code", "state"), [("2", "misconfigured"), ("1", "not begun")])
def test_a_job_that_slurm_has_forgotten(tmp_path, capsys, monkeypatch, code, state):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"job": "12", "runs": 0}))
    (folder / "outcome-12-0").write_text("75\n")
    (folder / "outcome-12-10").write_text(f"{code}\n")  # of the newest start
    assert status(tmp_path / "run", capsys)["state"] == state


def test_a_folder_that_is_none_of_a_run(tmp_path):
    for folder, needle in ((tmp_path, "holds no run and no job"), (tmp_path / "none", "is no folder")):
        done = run_command("status", folder)
        assert done.code == 2 and needle in done.err
