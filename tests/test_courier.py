"""Couriers: what they inherit, which runs they take for one, who may deliver, and how the command speaks."""

import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, prepare_recipe, run_command

from clm_dist import recipe
from clm_dist.errors import UserError
from clm_dist.publish import outbox
from clm_dist.publish.courier import Couriers, check_installed, courier_environment, destinations


def run_at(folder):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    return folder


def test_a_courier_inherits_keys_and_nothing_of_the_launcher():
    kept = {"WANDB_API_KEY": "k", "HF_TOKEN": "t", "PATH": "p", "SLURM_JOB_ID": "7", "HTTPS_PROXY": "x"}
    launcher = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK"]
    launcher += ["ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "CLM_DIST_OUTCOME", "PET_SIGNALS_TO_HANDLE"]
    assert courier_environment({**kept, **dict.fromkeys(launcher, "1")}) == kept


def test_a_run_keeps_its_id_when_it_is_moved_and_a_copy_gets_another(tmp_path):
    first = run_at(tmp_path / "first")
    ids = outbox.identify(first, {})
    assert len(ids["wandb"]) == 8 and outbox.identify(first, {}) == ids
    outbox.note(first, "wandb", arrived=7)
    moved = first.rename(tmp_path / "moved")
    assert outbox.identify(moved, ids)["wandb"] == ids["wandb"]
    assert outbox.notes(moved, "wandb") == {"arrived": 7}
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", moved, copy], check=True)
    assert outbox.identify(copy, ids)["wandb"] != ids["wandb"]  # both may be trained further
    assert outbox.notes(copy, "wandb") == {}


def test_a_run_that_lost_its_outbox_takes_the_id_of_its_checkpoint_and_a_fork_does_not(tmp_path):
    run = run_at(tmp_path / "run")
    ids = outbox.identify(run, {})
    (run / "outbox" / "ids.json").unlink()
    assert outbox.identify(run, ids)["wandb"] == ids["wandb"]
    assert outbox.identify(run_at(tmp_path / "fork"), ids)["wandb"] != ids["wandb"]


def test_one_process_delivers_and_leaves_when_asked(tmp_path):
    with outbox.held(tmp_path, "wandb") as still:
        assert still()
        with pytest.raises(outbox.TakenError, match=r"process \d+ on "), outbox.held(tmp_path, "wandb"):
            pass
        asked = iter([True, False])
        with pytest.raises(outbox.TakenError), outbox.held(tmp_path, "wandb", lambda: next(asked)):
            pass
        assert not still()
    with outbox.held(tmp_path, "wandb") as still:
        assert still()


def test_a_missing_tracker_names_its_extra(trained, monkeypatch):
    config = recipe.load(trained / "recipe.yaml", ["track.trackers=[wandb]"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed; run `pip install clm-dist\[wandb\]`"):
        check_installed(destinations(config))


def test_sync_says_what_is_wrong_with_its_input(trained, tmp_path):
    done = run_command("sync", tmp_path)
    assert done.code == 2 and "is no run folder" in done.err
    done = run_command("sync", trained / "run", "--only", "wandb")
    assert done.code == 2 and "--only wandb is no destination" in done.err
    done = run_command("sync", trained / "run")
    assert done.code == 0 and "names no destination; nothing has to leave" in done.out


def test_the_command_line_of_sync_imports_no_torch(trained):
    script = "import sys; from clm_dist.cli import main; main(['sync', sys.argv[1]]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(trained / "run")], check=True, capture_output=True)


def test_training_waits_for_its_couriers_for_a_bounded_time(tmp_path, monkeypatch):
    """The patience of the recipe when it finished, the limit when it has to leave, a moment where nothing answers."""
    run = run_at(tmp_path / "run")
    outbox.identify(run, {})
    command = [sys.executable, "-c", "import time; time.sleep(120)"]  # a courier that listens to nobody
    started = []

    def spawn(_, __):
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr("clm_dist.publish.courier._spawn", spawn)
    config = recipe.load(ROOT / "recipes" / "demo.yaml", ["track.wait_seconds=3"])
    waited = []
    for reason, limit, problem in (("finished", 600, None), ("preempted", 1, None), ("finished", 600, "no route")):
        said: list[str] = []
        couriers = Couriers(run, config, said.append)
        outbox.note(run, "wandb", problem=problem)
        couriers.start(["wandb", "tensorboard"])
        began = time.monotonic()
        couriers.end(reason, limit)
        waited.append(time.monotonic() - began)
        assert [line.split(" after ")[0] for line in said] == [
            f"{name}: not all has arrived" for name in ("wandb", "tensorboard")
        ]
    for process in started:
        process.kill()
        process.wait()
    assert 3 <= waited[0] < 60 and 1 <= waited[1] < 60  # both couriers have the same seconds, not one after the other


@pytest.mark.outside
def test_a_full_disk_under_the_outbox_stops_no_training(tmp_path):
    """It is said, training ends well, and what is missing is delivered once there is room."""
    pytest.importorskip("tensorboard")
    track = {"trackers": ["tensorboard"], "wait_seconds": 5}
    recipe_path, run = prepare_recipe(tmp_path, 60, track=track), tmp_path / "run"
    assert run_command("train", recipe_path, "train.max_steps=4").code == 0
    rows = len((run / "metrics.jsonl").read_text().splitlines())
    kept = tmp_path / "outbox"
    (run / "outbox").rename(kept)
    (run / "outbox").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", run / "outbox"], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.decode().strip()}")
    try:
        shutil.copytree(kept, run / "outbox", dirs_exist_ok=True)
        with pytest.raises(OSError, match="No space"), (run / "outbox" / "filled").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        done = run_command("train", recipe_path, "train.max_steps=8", "train.resume_changes=[train.max_steps]")
        assert done.code == 0 and "Traceback" not in done.err, done.err
        assert done.out.count(f"tensorboard: not all arrived; `clm-dist sync {run}` delivers the rest") == 1, done.out
        assert len((run / "metrics.jsonl").read_text().splitlines()) > rows
        (run / "outbox" / "filled").unlink()
        assert run_command("sync", run, "--status").code == 1
        assert run_command("sync", run).code == 0 and run_command("sync", run, "--status").code == 0
    finally:
        subprocess.run(["umount", run / "outbox"], check=True)
