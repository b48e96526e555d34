"""The promise under shards: interrupted in any way, a run gives what one that never was gives; a bad number of one rank is
everybody's, and nothing of its step is learned."""

import signal
from pathlib import Path

import pytest
from conftest import read_rows
from crash import Start, compare, crash_test, kill_once, prepare, wait_for
from test_recovery import FAULTY, last, reached

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed
STEPS = 16


@pytest.fixture(scope="module")
def go_on(launch_warm):
    """Begins a run of ZeRO-3, or goes on with it, to its end."""

    def gone_on(recipe, run):
        done = launch_warm(2, "train", recipe, f"run_dir={run}", config="zero3")
        assert done.code == 0, done.err

    return gone_on


@pytest.fixture(scope="module")
def folder(go_on, tmp_path_factory):
    """A recipe with accumulation, dropout, an evaluation and saves; its data; and a run of ZeRO-3 that went through."""
    folder = tmp_path_factory.mktemp("zero-recovery")
    prepare(folder, STEPS)
    go_on(folder / "recipe.yaml", folder / "reference")
    return folder


@pytest.mark.slow
def test_stopped_by_a_signal(folder, go_on, tmp_path):
    """One rank of ZeRO-3 hears SIGTERM: all stop at the same step with 75, and go on to the same bits."""
    run = tmp_path / "run"
    start = Start(folder / "recipe.yaml", run, 2, config="zero3")
    assert wait_for(lambda: reached(run) >= 5), start.log.read_text()
    start.send(signal.SIGTERM, "rank")
    assert start.wait() == 75, start.log.read_text()
    assert reached(run) < STEPS
    go_on(folder / "recipe.yaml", run)
    assert compare(run, folder / "reference") == []


@pytest.mark.slow
def test_killed_in_a_save(folder, go_on, tmp_path):
    """Both ranks and the launcher at once; the soak suite kills ten times, at any moment."""
    run = tmp_path / "run"
    start = Start(folder / "recipe.yaml", run, 2, config="zero3")
    kill_once(start, signal.SIGKILL, "tree", "save")
    assert 0 < reached(run) < STEPS, start.log.read_text()
    go_on(folder / "recipe.yaml", run)
    assert compare(run, folder / "reference") == []


@pytest.mark.parametrize(
    ("config", "action"),
    [
        pytest.param("zero3", "rewind", marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in [("zero2", "skip"), ("zero2", "rewind"), ("zero3", "skip")]
        ),
    ],
)
def test_a_bad_number_of_one_rank(command, launch_warm, folder, tmp_path, config, action):
    """NaN in rank 1's second micro-batch of step 10: both ranks skip it, or both go back; each comes by itself to the same
    hash of what was consumed, and the run ends."""
    run = tmp_path / "run"
    env = {"CLM_DIST_FAULT": "loss:nan:1:28", "CLM_DIST_NOTES": str(tmp_path)}
    settings = [f"run_dir={run}", f"train.on_nonfinite={action}"]
    done = launch_warm(2, "train", folder / "recipe.yaml", *settings, script=FAULTY, env=env, config=config)
    assert done.code == 0, done.err
    assert f"step 10: the loss is nan (that of rank 1 of 2); {action}" in done.out
    first, second = ((tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second and first[-1].split()[0] == str(STEPS) and first[-1].split()[2] == last(run)["consumed"]
    rows = read_rows(run / "ledger.jsonl")
    assert [row["step"] for row in rows if row["event"] == "rewind"] == ([7] if action == "rewind" else [])
    withheld = [row["step"] for row in rows if row["event"] == "step" and not row["update"]]
    assert withheld == ([10] if action == "skip" else [])
    assert all(row["train/loss"] < 7 for row in read_rows(run / "metrics.jsonl") if "train/loss" in row)
    verified = command("verify", run)
    assert verified.code == 0, verified.err


@pytest.mark.soak
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_killed_at_random_moments(tmp_path, config):
    """Weights, metrics and ledger are those of a run that was left alone, to the last bit."""
    kills = 10
    arguments = {"kills": kills, "processes": 2, "steps": 60, "signals": ["KILL"], "seed": 11}
    assert crash_test(tmp_path, **arguments, config=config) == []
    starts = [row for row in read_rows(Path(tmp_path) / "run" / "ledger.jsonl") if row["event"] == "start"]
    assert len(starts) > kills / 2  # most kills hit a run that had begun to train
