"""The promise: a run that is interrupted in any way gives what one that never was gives; and what fails is named.

Each case is launched for real, with two processes, through the same launcher as the users' own.
"""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import launch, read_rows, run_command
from crash import Start, compare, crash_test, prepare, wait_for
from safetensors.numpy import load_file

pytestmark = pytest.mark.distributed
FAULTY = Path(__file__).parent / "faulty.py"
STEPS = 36
PHASES = ["preparing", "data", "micro-step", "evaluation", "saving", "exporting"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe with accumulation, dropout, evaluations and saves; its data; and the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("recovery")
    prepare(folder, STEPS)
    reference = Start(folder / "recipe.yaml", folder / "reference", 2)
    assert reference.wait() == 0, reference.log.read_text()
    return folder


def faulty(folder, run, fault, *overrides):
    """A start with a fault; the launcher's result, the seconds it took, and failure.json."""
    began = time.monotonic()
    env = {"CLM_DIST_FAULT": fault}
    done = launch(2, "train", folder / "recipe.yaml", f"run_dir={run}", *overrides, script=FAULTY, env=env)
    failure = json.loads((run / "failure.json").read_text()) if (run / "failure.json").exists() else None
    return done, time.monotonic() - began, failure


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_all_and_is_named(folder, tmp_path):
    """In each phase of one run, one start after the other; then the run ends as if nothing had been."""
    run = tmp_path / "run"
    for place in PHASES:
        phase = {"data": "training", "micro-step": "training"}.get(place, place)
        done, _, failure = faulty(folder, run, f"{place}:raise:1")
        assert done.code == 1
        assert failure["rank"] == 1 and failure["world_size"] == 2 and failure["host"]
        assert failure["error"] == f"ValueError: injected while {place}" and "faulty.py" in failure["traceback"]
        assert failure["phase"] in (phase, "training")  # what goes wrong behind training's back comes up in training
        assert time.time() - failure["time"] < 10  # and the other rank, and the launcher, are gone since
        assert len(re.findall("clm-dist train: ", done.err)) == 1  # one line, not one of each victim
        assert f"failed: rank 1 of 2 on {failure['host']}" in done.err
    again = launch(2, "train", folder / "recipe.yaml", f"run_dir={run}")
    assert again.code == 0, again.err
    assert not (run / "failure.json").exists() and len(list((run / "failures").iterdir())) == len(PHASES)
    assert compare(run, folder / "reference") == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("data:kill:1:9", "its process is gone"),
        pytest.param("data:hang:1:9", "no progress for", marks=pytest.mark.slow),
        # the launcher takes half a minute to end a process that stands still
        pytest.param("data:stop:1:9", "no sign of life for", marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_is_gone_or_stuck_is_named(folder, tmp_path, fault, reason):
    done, _, failure = faulty(folder, tmp_path / "run", fault, "train.hang_seconds=8")
    assert done.code == 1
    assert failure["rank"] == 1 and failure["phase"] == "training", failure
    assert failure["error"].startswith(reason) and "Thread" not in failure["error"]
    if "hang" in fault:
        assert "time.sleep(3600)" in failure["traceback"]  # where it hangs
        assert failure["step"] == 9
    last = read_rows(tmp_path / "run" / "ledger.jsonl")[-1]
    assert failure["time"] - last["time"] < 8  # named within the limit
    assert f"failed: rank 1 of 2 on {failure['host']}" in done.err


@pytest.mark.slow
def test_a_bad_number_on_one_rank_is_everybodys_and_can_be_replayed(folder, tmp_path):
    """Stop: saved before it. Skip: the update is withheld. Rewind: back, and past the data."""
    fault = "loss:nan:1:40"  # rank 1's second micro-batch of step 14, of three
    done, _, failure = faulty(folder, tmp_path / "stop", fault)
    assert done.code == 1 and "step 14: the loss is nan (that of rank 1 of 2)" in failure["error"], done.err
    assert json.loads((tmp_path / "stop/checkpoints/step-00000013/state.json").read_text())["step"] == 13
    weights = {}
    for action in ("skip", "rewind"):
        run = tmp_path / action
        done, _, failure = faulty(folder, run, fault, f"train.on_nonfinite={action}", "train.resume=never")
        assert done.code == 0 and failure is None, done.err
        assert f"step 14: the loss is nan (that of rank 1 of 2); {action}" in done.out
        rows = read_rows(run / "ledger.jsonl")
        weights[action] = load_file(run / "model" / "model.safetensors")
        verified = run_command("verify", run)
        assert verified.code == 0, verified.err
        if action == "skip":
            assert [row["step"] for row in rows if row["event"] == "step" and not row["update"]] == [14]
            assert "1 updates withheld" in verified.out
        else:
            [back] = [row for row in rows if row["event"] == "rewind"]
            assert (back["step"], back["cursor"]) == (7, 14 * 12)  # the checkpoint of step 7; 14 steps of 12 blocks
            assert "84 blocks passed over in 1 rewinds" in verified.out
    assert any((weights["skip"][name] != weights["rewind"][name]).any() for name in weights["skip"])


@pytest.mark.slow
def test_replay_shows_the_batch_that_overflows(folder, tmp_path):
    """A weight that is infinite for one token: whichever rank meets it, and `replay` meets it again in one process."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    model = tmp_path / "model"
    shutil.copytree(folder / "reference" / "model", model)
    weights = load(model / "model.safetensors")
    weights["transformer.wte.weight"][261] = 1e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    overrides = [
        "model.type=null",
        "model.config={}",
        f"model.name={model}",
        f"run_dir={run}",
        "train.micro_batch_size=1",
    ]
    refused = launch(2, "train", folder / "recipe.yaml", *overrides)
    assert refused.code and "no finite numbers before its first step" in refused.err and not run.exists()
    done = launch(2, "train", folder / "recipe.yaml", *overrides, "model.check_causality=false")
    assert done.code == 1, done.err
    failure = json.loads((run / "failure.json").read_text())
    step = int(re.search(r"step (\d+): the loss is", failure["error"])[1])
    ranks = re.search(r"that of rank ([\d, ]+) of 2", failure["error"])[1].split(", ")
    replayed = run_command("replay", run, step)
    assert replayed.code == 0, replayed.err
    rows = [line.split() for line in replayed.out.splitlines()[2:]]
    assert len(rows) == 12  # each micro-batch of each rank
    assert sorted({row[0] for row in rows if row[2] in ("nan", "inf")}) == ranks
    assert "not finite in transformer.wte.weight" in replayed.out
    assert run_command("replay", run, step + 1).code == 2


def test_ranks_that_differ_are_found(folder, tmp_path):
    done, _, failure = faulty(folder, tmp_path / "run", "update:flip:1:12", "train.compare_ranks_every=5")
    assert done.code == 1
    assert "the ranks hold different weights: transformer.wte.weight differs first (rank" in failure["error"], done.err
    assert failure["step"] == 15


@pytest.mark.slow
def test_worlds_of_other_sizes_go_on_with_the_same_blocks(folder, tmp_path):
    """1, 2, 3 and 1 processes in one run. Dropout goes by micro-batches, which stay the same size."""
    run = tmp_path / "run"
    for processes, steps in ((1, 9), (2, 16), (3, 25), (1, None)):
        start = Start(folder / "recipe.yaml", run, processes)
        if steps is not None:
            assert wait_for(lambda steps=steps: reached(run) >= steps, 60), start.log.read_text()
            start.send(signal.SIGTERM, "all")
        assert start.wait() == (0 if steps is None else 75), start.log.read_text()
    rows = read_rows(run / "ledger.jsonl")
    assert [row["world_size"] for row in rows if row["event"] == "start"] == [1, 2, 3, 1]
    verified = run_command("verify", run)
    assert verified.code == 0, verified.err
    reference = folder / "reference"
    assert last(run)["consumed"] == last(reference)["consumed"]  # exactly the same blocks in the same steps
    losses = [
        [row["train/loss"] for row in read_rows(one / "metrics.jsonl") if "train/loss" in row]
        for one in (run, reference)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == STEPS / 3


def reached(run):
    """The newest step in a ledger that may be in the midst of a row."""
    try:
        return json.loads((run / "ledger.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return -1


def last(run):
    return [row for row in read_rows(run / "ledger.jsonl") if row["event"] == "step"][-1]


def interrupted_everywhere(folder, run, signals):
    """Sends a signal in each phase, one start after the other; every start goes on from where the last one left.

    signals: (target, number) for each phase.
    """
    marker = run.with_suffix(".marker")
    for place, (target, number) in zip(PHASES, signals, strict=True):
        marker.unlink(missing_ok=True)
        env = {"CLM_DIST_FAULT": f"{place}:pause", "CLM_DIST_MARKER": str(marker)}
        start = Start(folder / "recipe.yaml", run, 2, env=env, script=FAULTY)
        assert wait_for(marker.exists, 60), (place, start.log.read_text())
        start.send(number, target)
        code = start.wait(40)
        assert code == 75, (place, code, start.log.read_text()[-3000:])
    last_start = Start(folder / "recipe.yaml", run, 2)
    assert last_start.wait() == 0, last_start.log.read_text()


SIGNALS = [(target, number) for number in (signal.SIGTERM, signal.SIGUSR1) for target in ("rank", "launcher", "all")]


@pytest.mark.slow
def test_a_signal_in_every_phase(folder, tmp_path):
    """Six signals in six phases, each once; the soak suite sends each in all of them."""
    interrupted_everywhere(folder, tmp_path / "run", SIGNALS)
    assert compare(tmp_path / "run", folder / "reference") == []


@pytest.mark.soak
@pytest.mark.parametrize(("target", "number"), SIGNALS)
def test_each_signal_in_every_phase(folder, tmp_path, target, number):
    interrupted_everywhere(folder, tmp_path / "run", [(target, number)] * len(PHASES))
    assert compare(tmp_path / "run", folder / "reference") == []


def test_a_signal_to_one_rank(folder, tmp_path):
    """The others have not heard it, and stop at the same step."""
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5, 60)
    start.send(signal.SIGUSR1, "rank")
    assert start.wait() == 75, start.log.read_text()
    assert Start(folder / "recipe.yaml", tmp_path / "run", 2).wait() == 0
    assert compare(tmp_path / "run", folder / "reference") == []


@pytest.mark.slow
def test_a_stop_file_is_the_wish_of_somebody_who_is_there(folder, tmp_path):
    """130 from whichever rank notes its code first, not 75: nothing queues the run again. It goes on when asked to."""
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5, 60)
    (tmp_path / "run" / "STOP").touch()
    assert start.wait() == 130, start.log.read_text()
    assert Start(folder / "recipe.yaml", tmp_path / "run", 2).wait() == 0
    assert compare(tmp_path / "run", folder / "reference") == []


def alive(pid):
    """Whether a process runs; nobody may be there to reap one whose launcher died."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_launcher_that_dies_of_a_signal(folder, tmp_path):
    """Without PET_SIGNALS_TO_HANDLE, SIGUSR1 kills it at once; its ranks find it gone, save, and leave."""
    heard_by_default = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT"}
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2, heard_by_default)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5, 60)
    ranks = start.ranks()
    start.send(signal.SIGUSR1, "launcher")
    told = "stopped by the end of the launcher; saved at step"  # by rank 0; another may be the first to note its code
    assert wait_for(lambda: start.outcome.exists() and told in start.log.read_text(), 30), start.log.read_text()
    assert wait_for(lambda: not any(alive(pid) for pid in ranks), 30)  # each notes its code at its own end
    assert start.wait() == 75
    assert Start(folder / "recipe.yaml", tmp_path / "run", 2).wait() == 0
    assert compare(tmp_path / "run", folder / "reference") == []


@pytest.mark.slow
def test_mutant_a_flag_of_one_rank(folder, tmp_path):
    """Who stops when it alone was told to leaves the others in a collective without it."""
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2, {"CLM_DIST_FAULT": "none:local-flag"}, FAULTY)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5, 60)
    start.send(signal.SIGUSR1, "rank")
    assert start.wait() != 75


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["none", pytest.param("unsettled", marks=pytest.mark.soak)])
def test_three_processes_too_are_equal_to_the_last_bit(folder, tmp_path, mutant):
    """Three numbers can be added up in different orders: DDP's first buckets are others than its later ones (mutant)."""
    env = {"CLM_DIST_FAULT": f"none:{mutant}"}
    runs = [tmp_path / name for name in ("stopped", "reference")]
    start = Start(folder / "recipe.yaml", runs[0], 3, env, FAULTY)
    assert wait_for(lambda: reached(runs[0]) >= 10, 60)
    start.send(signal.SIGTERM, "all")
    assert start.wait() == 75, start.log.read_text()
    for run in runs:
        assert Start(folder / "recipe.yaml", run, 3, env, FAULTY).wait() == 0
    assert (compare(*runs) == []) == (mutant == "none")


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(3, 150, marks=pytest.mark.slow), pytest.param(25, 400, marks=pytest.mark.soak)]
)
def test_killed_at_random_moments(tmp_path, kills, steps):
    assert crash_test(tmp_path, kills=kills, processes=2, steps=steps, signals=["KILL"], seed=11) == []
