"""Dashboards get the rows of metrics.jsonl; offline, without an account."""

import json
import subprocess
import sys

import pytest
from conftest import read_rows, run_command

from clm_dist import recipe
from clm_dist.errors import UserError
from clm_dist.publish.trackers import MetricsFile, check_installed, flat


def test_tensorboard_and_wandb_offline_get_every_row(trained, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    done = run_command(
        "train", trained / "recipe.yaml", f"run_dir={tmp_path / 'run'}", "train.max_steps=4",
        "track.trackers=[tensorboard, wandb]", "track.project=a-test",
        env={"WANDB_API_KEY": "0123456789" * 4, "WANDB_ERROR_REPORTING": "false"},
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    wanted = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in seen] == [step for step, _ in wanted]
    assert [value for _, value in seen] == pytest.approx([value for _, value in wanted], rel=1e-6)

    [log] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    records = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    assert records.count("train/loss") >= 4 and "trainer/step" in records
    for path in (tmp_path / "run").rglob("*"):  # the key travels by environment only
        assert not path.is_file() or b"0123456789" * 4 not in path.read_bytes(), path


def test_a_missing_tracker_names_its_extra(trained, monkeypatch):
    config = recipe.load(trained / "recipe.yaml", ["track.trackers=[wandb]"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed; run `pip install clm-dist\[wandb\]`"):
        check_installed(config)


def test_a_row_is_on_disk_when_it_is_logged(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log({"train/loss": 1.5}, step=3)
    [row] = read_rows(tmp_path / "metrics.jsonl")  # not closed yet
    assert (row["step"], row["train/loss"]) == (3, 1.5)
    metrics.finish()


def test_the_flat_configuration_is_plain_values(trained):
    values = flat(recipe.load(trained / "recipe.yaml", []))
    assert values["data.block_size"] == 16
    assert json.loads(values["model.config"])["n_embd"] == 32
    assert all(value is None or isinstance(value, (str, int, float, bool)) for value in values.values())
