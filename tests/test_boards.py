"""TensorBoard, Trackio and MLflow through Accelerate's tracker classes show the rows of metrics.jsonl, each once."""

import json
import os
import subprocess
import sys

import pytest

from clm_dist.publish import outbox

TRAIN = {"train/loss": 1.5, "train/lr": 0.01, "perf/seconds_per_step": 0.1}


def write(run, *steps):
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "time": 1.0, "eval/loss": 100.0 + step}) + "\n")
            file.write(json.dumps({"step": step, "time": 1.0, **TRAIN, "train/loss": float(step)}) + "\n")


@pytest.fixture
def run(trained, tmp_path):
    """A run folder with a few rows that names the dashboard."""
    folder = tmp_path / "run"
    folder.mkdir()
    outbox.identify(folder, {})
    write(folder, 2, 4, 6, 8, 10)
    text = (trained / "run" / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("trackers: []", "trackers: [tensorboard, trackio, mlflow]"))
    return folder


def sync(run, name, **more):
    command = [sys.executable, "-m", "clm_dist", "sync", str(run), "--only", name]
    environment = {**os.environ, "TRACKIO_DIR": str(run.parent / "trackio"), "MLFLOW_DISABLE_TELEMETRY": "true", **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: all has arrived" in done.stdout


def deliver_in_three(run, name):
    """All; again, nothing; what a resume computed again after the notes were lost, and more."""
    sync(run, name)
    sync(run, name)
    known = outbox.notes(run, name)
    outbox.note(run, name, **{**known, "sent": {"train": 6}})  # killed before it noted the last two
    write(run, 12)
    sync(run, name)


def test_tensorboard(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    deliver_in_three(run, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(step, step) for step in (2, 4, 6, 8, 10, 12)]
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(10, 110.0)]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_mlflow(run):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    deliver_in_three(run, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    run_id = outbox.notes(run, "mlflow")["run_id"]
    seen = [(one.step, one.value) for one in client.get_metric_history(run_id, "train/loss")]
    assert seen == [(step, step) for step in (2, 4, 6, 8, 10, 12)]
    assert [(one.step, one.value) for one in client.get_metric_history(run_id, "eval/loss")] == [(10, 110.0)]
    assert client.get_run(run_id).data.params["data.block_size"] == "16"


def test_trackio(run):
    pytest.importorskip("trackio")
    deliver_in_three(run, "trackio")
    script = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps(S.get_logs('clm-dist', sys.argv[1])))"
    )
    name = outbox.notes(run, "trackio")["run_name"]
    environment = {**os.environ, "TRACKIO_DIR": str(run.parent / "trackio")}
    out = subprocess.run(
        [sys.executable, "-c", script, name], env=environment, capture_output=True, text=True, check=True
    ).stdout
    rows = json.loads(out)
    assert [(row["step"], row["train/loss"]) for row in rows] == [(step, step) for step in (2, 4, 6, 8, 10, 12)]
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [110.0]
