"""The C++ extension that DeepSpeed builds at first use: locks of builds that were killed. And exports that are read back."""

import fcntl
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from clm_dist.config import ModelConfig
from clm_dist.engine import deepspeed as ours
from clm_dist.errors import RunError
from clm_dist.model import transformers_versions
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration
from clm_dist.publish.export import check_loaded, check_written

pytest.importorskip("deepspeed")

# holds the guard until it is told to end, as a process that builds does
BUILDS = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"


@pytest.fixture
def built(monkeypatch):
    """How often the extension was asked for; nothing is compiled."""
    asked = []
    builder = SimpleNamespace(load=lambda verbose: asked.append(verbose))
    accelerator = SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return asked


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Our own folder of extensions, in which a build that was killed left its lock."""
    monkeypatch.setenv(ours.EXTENSIONS, "")  # put back afterwards, whatever is set meanwhile
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = ours.extensions_folder()
    assert folder.is_relative_to(tmp_path / "clm-dist")
    return folder, left_lock(folder)


def left_lock(folder):
    (folder / "deepspeed_shm_comm").mkdir(parents=True)
    lock = folder / "deepspeed_shm_comm" / "lock"
    lock.touch()
    return lock


def test_locks_are_found_one_and_two_folders_down(tmp_path):
    lock = left_lock(tmp_path / "py311_cpu")
    assert ours.stale_locks(tmp_path) == ours.stale_locks(tmp_path / "py311_cpu") == [lock]


def test_a_lock_in_a_folder_of_the_users_is_named_and_stays(tmp_path, monkeypatch, built):
    lock = left_lock(tmp_path)
    monkeypatch.setenv(ours.EXTENSIONS, str(tmp_path))
    with pytest.raises(RunError) as caught:
        ours.build_extension()
    assert str(caught.value).startswith(f"{lock} was left by a build that ended")
    assert f"unset {ours.EXTENSIONS}" in str(caught.value)
    assert lock.exists() and built == []


def test_a_lock_that_we_left_in_a_folder_of_the_users_is_removed(tmp_path, monkeypatch, built):
    """A build of ours that was killed: the guard still says that one began."""
    lock = left_lock(tmp_path)
    (tmp_path / ".clm-dist.lock").write_text("process 1 builds\n")
    monkeypatch.setenv(ours.EXTENSIONS, str(tmp_path))
    ours.build_extension()
    assert not lock.exists() and built == [False]
    assert (tmp_path / ".clm-dist.lock").read_text() == ""  # it ended


def test_two_environments_do_not_share_a_folder(own, monkeypatch):
    folder, _ = own
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert ours.extensions_folder() != folder


def test_a_lock_in_our_own_folder_is_removed_and_said(own, capsys, built):
    _, lock = own
    ours.build_extension()
    removed, compiling = capsys.readouterr().out.splitlines()
    assert removed == f"removed {lock}, which a build that was killed left behind"
    assert compiling.startswith("compiling what DeepSpeed needs on CPUs, once, into ")
    assert not lock.exists() and built == [False]


def test_a_build_that_lives_is_waited_for(own, monkeypatch, capsys, built):
    """Its lock is torch's own, and no stale one: nothing is looked at before the guard is free."""
    folder, lock = own
    command = [sys.executable, "-c", BUILDS, str(folder / ".clm-dist.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        original, waited = fcntl.flock, []

        def flock(file, how):
            with pytest.raises(BlockingIOError):
                original(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if how & fcntl.LOCK_NB:
                original(file, how)
            assert lock.exists() and built == []
            waited.append(how)
            lock.unlink()  # the build ends well, and its process with it
            other.stdin.close()
            original(file, how)

        monkeypatch.setattr(fcntl, "flock", flock)
        ours.build_extension()
    assert waited == [fcntl.LOCK_EX] and built == [False]
    assert "waiting for the process that compiles into" in capsys.readouterr().out


WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.full((2,), float("nan"))}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({**WEIGHTS, "a": torch.zeros(0)}, r"a \(0,\) torch.float32 is not the live \(2, 3\)"),
        ({"a": WEIGHTS["a"]}, r"lacks b \(and 0 more\)"),
        ({**WEIGHTS, "a": WEIGHTS["a"] + 1e-6}, "a .* is not the live"),
        ({**WEIGHTS, "a": WEIGHTS["a"].bfloat16()}, "a .* torch.bfloat16 is not the live .* torch.float32"),
    ],
    ids=["empty", "missing", "changed", "another type"],
)
def test_an_export_that_is_not_the_live_model_is_named(tmp_path, written, message):
    save_file(written, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=message):
        check_written(tmp_path, WEIGHTS)


def test_an_export_of_the_live_bits_passes(tmp_path):
    """NaN is equal to itself; of tied weights one is enough."""
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert check_written(tmp_path, {**WEIGHTS, "tied": WEIGHTS["a"]})


def test_an_export_under_other_names_is_judged_by_loading_it(tmp_path):
    """transformers 5 writes GPT-NeoX's head by its former name, and experts one by one."""
    config = ModelConfig(type="gpt_neox", preset="tiny")
    model = build_model(config, model_configuration(config, {"vocab_size": 60}), 0)
    model.save_pretrained(tmp_path)
    live = model.state_dict()
    assert check_written(tmp_path, live) == (transformers_versions.MAJOR < 5)
    check_loaded(tmp_path, type(model), live)
    with pytest.raises(RunError, match=r"does not load as the live model: .*embed_in\.weight is another"):
        check_loaded(
            tmp_path, type(model), {name: one + (1e-6 if "embed_in" in name else 0) for name, one in live.items()}
        )
