"""The promise: a run that is interrupted in any way gives what one that never was gives; and what fails is named.

Each case is real processes. Those that are signalled or killed, and those in which the launcher has a part, have a launch
of their own, through the same launcher as the users' own; the others, and the starts that go on, share one (`launch_warm`).
"""

import json
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from conftest import launch, read_rows
from crash import Start, compare, crash_test, prepare, wait_for
from safetensors.numpy import load_file

pytestmark = pytest.mark.distributed
FAULTY = Path(__file__).parent / "faulty.py"
STEPS = 36
PHASES = ["preparing", "data", "micro-step", "evaluation", "saving", "exporting"]


@pytest.fixture(scope="module")
def go_on(launch_warm):
    """Begins a run, or goes on with it, to its end."""

    def gone_on(recipe, run, processes=2, fault="none:none"):
        env = {"CLM_DIST_FAULT": fault}
        done = launch_warm(processes, "train", recipe, f"run_dir={run}", script=FAULTY, env=env)
        assert done.code == 0, done.err

    return gone_on


@pytest.fixture(scope="module")
def folder(go_on, tmp_path_factory):
    """A recipe with accumulation, dropout, evaluations and saves; its data; and the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("recovery")
    prepare(folder, STEPS)
    go_on(folder / "recipe.yaml", folder / "reference")
    return folder


@pytest.fixture(scope="module")
def faulty(launch_warm, folder):
    """A start with a fault: how it ended, and failure.json. launch: the one to take, where the launcher has a part."""

    def started(run, fault, *overrides, processes=2, launch=launch_warm):
        arguments = ("train", folder / "recipe.yaml", f"run_dir={run}", *overrides)
        done = launch(processes, *arguments, script=FAULTY, env={"CLM_DIST_FAULT": fault})
        failure = json.loads((run / "failure.json").read_text()) if (run / "failure.json").exists() else None
        return done, failure

    return started


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_all_and_is_named(folder, faulty, go_on, tmp_path):
    """In each phase of one run, one start after the other; then the run ends as if nothing had been. One start of all has
    the launcher's agent end the other rank."""
    run = tmp_path / "run"
    for place in PHASES:
        phase = {"data": "training", "micro-step": "training"}.get(place, place)
        own = {"launch": launch} if place == "micro-step" else {}
        done, failure = faulty(run, f"{place}:raise:1", **own)
        assert done.code == 1
        assert failure["rank"] == 1 and failure["world_size"] == 2 and failure["host"]
        assert failure["error"] == f"ValueError: injected while {place}" and "faulty.py" in failure["traceback"]
        assert failure["phase"] in (phase, "training")  # what goes wrong behind training's back comes up in training
        assert time.time() - failure["time"] < 10  # and the other rank, and the launcher, are gone since
        assert len(re.findall("clm-dist train: ", done.err)) == 1  # one line, not one of each victim
        assert f"failed: rank 1 of 2 on {failure['host']}" in done.err
    go_on(folder / "recipe.yaml", run)
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
def test_a_rank_that_is_gone_or_stuck_is_named(faulty, tmp_path, fault, reason):
    done, failure = faulty(tmp_path / "run", fault, "train.hang_seconds=8", launch=launch)
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
def test_a_bad_number_on_one_rank_is_everybodys_and_can_be_replayed(command, faulty, tmp_path):
    """Stop: saved before it. Skip: the update is withheld. Rewind: back, and past the data."""
    fault = "loss:nan:1:40"  # rank 1's second micro-batch of step 14, of three
    done, failure = faulty(tmp_path / "stop", fault)
    assert done.code == 1 and "step 14: the loss is nan (that of rank 1 of 2)" in failure["error"], done.err
    assert json.loads((tmp_path / "stop/checkpoints/step-00000013/state.json").read_text())["step"] == 13
    weights = {}
    for action in ("skip", "rewind"):
        run = tmp_path / action
        done, failure = faulty(run, fault, f"train.on_nonfinite={action}", "train.resume=never")
        assert done.code == 0 and failure is None, done.err
        assert f"step 14: the loss is nan (that of rank 1 of 2); {action}" in done.out
        rows = read_rows(run / "ledger.jsonl")
        weights[action] = load_file(run / "model" / "model.safetensors")
        verified = command("verify", run)
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
def test_replay_shows_the_batch_that_overflows(command, launch_warm, folder, tmp_path):
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
    refused = launch_warm(2, "train", folder / "recipe.yaml", *overrides)
    assert refused.code and "no finite numbers before its first step" in refused.err and not run.exists()
    done = launch_warm(2, "train", folder / "recipe.yaml", *overrides, "model.check_causality=false")
    assert done.code == 1, done.err
    failure = json.loads((run / "failure.json").read_text())
    step = int(re.search(r"step (\d+): the loss is", failure["error"])[1])
    ranks = re.search(r"that of rank ([\d, ]+) of 2", failure["error"])[1].split(", ")
    replayed = command("replay", run, step)
    assert replayed.code == 0, replayed.err
    rows = [line.split() for line in replayed.out.splitlines()[2:]]
    assert len(rows) == 12  # each micro-batch of each rank
    assert sorted({row[0] for row in rows if row[2] in ("nan", "inf")}) == ranks
    assert "not finite in transformer.wte.weight" in replayed.out
    assert command("replay", run, step + 1).code == 2


def test_ranks_that_differ_are_found(faulty, tmp_path):
    done, failure = faulty(tmp_path / "run", "update:flip:1:12", "train.compare_ranks_every=5")
    assert done.code == 1
    assert "the ranks hold different weights: transformer.wte.weight differs first (rank" in failure["error"], done.err
    assert failure["step"] == 15


@pytest.mark.slow
def test_worlds_of_other_sizes_go_on_with_the_same_blocks(command, folder, faulty, go_on, tmp_path):
    """1, 2, 3 and 1 processes in one run, each but the last of which ends by a fault a while after a save. Dropout goes by
    micro-batches, which stay the same size."""
    run = tmp_path / "run"
    for processes in (1, 2, 3):
        done, failure = faulty(run, "data:raise::9", processes=processes)  # in the tenth step of each
        assert done.code == 1 and failure["world_size"] == processes, done.err
    go_on(folder / "recipe.yaml", run, 1)
    rows = read_rows(run / "ledger.jsonl")
    assert [row["world_size"] for row in rows if row["event"] == "start"] == [1, 2, 3, 1]
    verified = command("verify", run)
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


def interrupted_everywhere(folder, go_on, run, signals):
    """Sends a signal in each phase, one start after the other; every start goes on from where the last one left.

    signals: (target, number) for each of some phases.
    """
    marker = run.with_suffix(".marker")
    for place, (target, number) in signals.items():
        marker.unlink(missing_ok=True)
        env = {"CLM_DIST_FAULT": f"{place}:pause", "CLM_DIST_MARKER": str(marker)}
        start = Start(folder / "recipe.yaml", run, 2, env=env, script=FAULTY)
        assert wait_for(marker.exists), (place, start.log.read_text())
        start.send(number, target)
        code = start.wait()
        assert code == 75, (place, code, start.log.read_text()[-3000:])
    go_on(folder / "recipe.yaml", run)
    assert compare(run, folder / "reference") == []


SIGNALS = [(target, number) for number in (signal.SIGTERM, signal.SIGUSR1) for target in ("rank", "launcher", "all")]


@pytest.mark.slow
def test_a_signal_in_three_phases(folder, go_on, tmp_path):
    """To a rank, the launcher and all; the soak suite sends each of six signals in each of six phases."""
    signals = dict(zip(PHASES[1::2], [SIGNALS[0], SIGNALS[4], SIGNALS[2]], strict=True))
    interrupted_everywhere(folder, go_on, tmp_path / "run", signals)


@pytest.mark.soak
@pytest.mark.parametrize(("target", "number"), SIGNALS)
def test_each_signal_in_every_phase(folder, go_on, tmp_path, target, number):
    interrupted_everywhere(folder, go_on, tmp_path / "run", dict.fromkeys(PHASES, (target, number)))


def test_a_signal_to_one_rank(folder, go_on, tmp_path):
    """The others have not heard it, and stop at the same step."""
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5)
    start.send(signal.SIGUSR1, "rank")
    assert start.wait() == 75, start.log.read_text()
    go_on(folder / "recipe.yaml", tmp_path / "run")
    assert compare(tmp_path / "run", folder / "reference") == []


@pytest.mark.slow
def test_a_stop_file_is_the_wish_of_somebody_who_is_there(folder, go_on, tmp_path):
    """130 from whichever rank notes its code first, not 75: nothing queues the run again. It goes on when asked to."""
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5)
    (tmp_path / "run" / "STOP").touch()
    assert start.wait() == 130, start.log.read_text()
    go_on(folder / "recipe.yaml", tmp_path / "run")
    assert compare(tmp_path / "run", folder / "reference") == []


def alive(pid):
    """Whether a process runs; nobody may be there to reap one whose launcher died."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_launcher_that_dies_of_a_signal(folder, go_on, tmp_path):
    """Without PET_SIGNALS_TO_HANDLE, SIGUSR1 kills it at once; its ranks find it gone, save, and leave."""
    heard_by_default = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT"}
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2, heard_by_default)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5)
    ranks = start.ranks()
    start.send(signal.SIGUSR1, "launcher")
    told = "stopped by the end of the launcher; saved at step"  # by rank 0; another may be the first to note its code
    assert wait_for(lambda: start.outcome.exists() and told in start.log.read_text()), start.log.read_text()
    assert wait_for(lambda: not any(alive(pid) for pid in ranks))  # each notes its code at its own end
    assert start.wait() == 75
    go_on(folder / "recipe.yaml", tmp_path / "run")
    assert compare(tmp_path / "run", folder / "reference") == []


@pytest.mark.slow
def test_mutant_a_flag_of_one_rank(folder, tmp_path):
    """Who stops when it alone was told to leaves the others in a collective without it."""
    start = Start(folder / "recipe.yaml", tmp_path / "run", 2, {"CLM_DIST_FAULT": "none:local-flag"}, FAULTY)
    assert wait_for(lambda: reached(tmp_path / "run") >= 5)
    start.send(signal.SIGUSR1, "rank")
    assert start.wait() != 75


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", pytest.param("unsettled", marks=pytest.mark.soak)])
def test_three_processes_too_are_equal_to_the_last_bit(folder, faulty, go_on, tmp_path, fault):
    """Three numbers can be added up in different orders: DDP's first buckets are others than its later ones (mutant)."""
    runs = [tmp_path / name for name in ("broken_off", "reference")]
    done, failure = faulty(runs[0], f"data:{fault}::9", processes=3)
    assert done.code == 1 and failure["error"] == "ValueError: injected while data", done.err
    for run in runs:
        go_on(folder / "recipe.yaml", run, 3, f"none:{fault}")
    assert (compare(*runs) == []) == (fault == "raise")


@pytest.mark.soak
def test_compiled_blocks_go_on_to_the_last_bit(launch_warm, folder, tmp_path):
    """As on a GPU by default: each start compiles them, and finds nothing that another has compiled."""

    def start(run, fault="none:none"):
        env = {"CLM_DIST_FAULT": fault, "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=tmp_path)}
        arguments = ("train", folder / "recipe.yaml", f"run_dir={run}", "train.compile=on")
        return launch_warm(2, *arguments, script=FAULTY, env=env)

    broken_off, reference = tmp_path / "broken_off", tmp_path / "reference"
    done = start(broken_off, "data:raise:1:20")
    assert done.code == 1 and reached(broken_off) >= 6, done.err
    for run in (broken_off, reference):
        done = start(run)
        assert done.code == 0 and "2 blocks are compiled" in done.out, done.out + done.err
    assert compare(broken_off, reference) == []
    assert compare(reference, folder / "reference")  # they were: it is another order of sums


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(2, 60, marks=pytest.mark.slow), pytest.param(25, 400, marks=pytest.mark.soak)]
)
def test_killed_at_random_moments(tmp_path, kills, steps):
    assert crash_test(tmp_path, kills=kills, processes=2, steps=steps, signals=["KILL"], seed=11) == []
