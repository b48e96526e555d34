"""Couriers: what they inherit, which runs they take for one, who may deliver, and how the command speaks."""

import subprocess
import sys

import pytest
from conftest import run_command

from clm_dist import recipe
from clm_dist.errors import UserError
from clm_dist.publish import outbox
from clm_dist.publish.courier import check_installed, courier_environment, destinations


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
