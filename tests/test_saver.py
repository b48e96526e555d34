"""Saving beside training: what is written is what was, and what goes wrong is neither lost nor the end."""

import errno
import threading

import pytest
import torch
from accelerate import Accelerator
from conftest import recipe_values

from clm_dist import recipe
from clm_dist.checkpoint import content, disk, folder, tensors
from clm_dist.engine.replicated import Replicated
from clm_dist.training.saver import Saver
from clm_dist.training.state import TrainState
from clm_dist.watch.watch import Watch


@pytest.fixture
def saver(tmp_path):
    """Of a small model that has learned something."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    config = recipe.build(recipe_values(tmp_path, checkpoint={"keep_last": 2}))
    accelerator = Accelerator(cpu=True)
    return Saver(accelerator, config, Replicated(accelerator, model, optimizer, 1.0), tmp_path / "run", Watch())


def saved_weight(saver, step):
    [one] = [one for one in folder.checkpoints(saver.folder) if one.step == step]
    assert one.problem() is None
    return content.read(one, "model").whole("weight", torch.Size([3, 4]))


def spoil(monkeypatch, module, name, error):
    """The next call of module.name raises."""
    original, errors = getattr(module, name), [error]

    def wrapped(*arguments):
        if errors:
            raise errors.pop()
        return original(*arguments)

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("copied", [True, False], ids=["ours", "mutant without a copy"])
def test_what_is_written_behind_training_is_what_was(saver, monkeypatch, copied):
    before, go_on = saver.engine.plain.weight.detach().clone(), threading.Event()
    original = tensors.save
    monkeypatch.setattr(tensors, "save", lambda *arguments: (go_on.wait(10), original(*arguments))[1])
    if not copied:
        monkeypatch.setattr(Saver, "_copied", lambda self, kind, held: held)
    saver.save(TrainState(step=7), {}, wait=False)
    with torch.no_grad():
        saver.engine.plain.weight += 1  # training goes on while nothing is written yet
    go_on.set()
    saver.wait()
    assert torch.equal(saved_weight(saver, 7), before) == copied


def test_a_full_disk_is_said_and_the_older_checkpoint_stays(saver, monkeypatch):
    saver.save(TrainState(step=1), {}, wait=True)
    spoil(monkeypatch, disk, "write", OSError(errno.ENOSPC, "No space left on device", "model"))
    saver.save(TrainState(step=2), {}, wait=False)
    saver.wait()
    assert saver.problem == "checkpoint of step 2 failed: rank 0: No space left on device (model)" and saver.newest == 1
    assert [one.step for one in folder.checkpoints(saver.folder)] == [1]
    saver.forget()
    saver.save(TrainState(step=2), {}, wait=True)
    assert saver.problem is None and saver.newest == 2


@pytest.mark.parametrize(("module", "name"), [(tensors, "save"), (folder, "commit")])
def test_an_error_of_the_thread_comes_up_in_the_main_one(saver, monkeypatch, module, name):
    spoil(monkeypatch, module, name, ValueError("a mistake of ours"))
    saver.save(TrainState(step=1), {}, wait=False)
    with pytest.raises(ValueError, match="a mistake of ours"):
        saver.wait()
    assert saver.newest == -1


def test_the_same_step_is_saved_once(saver, monkeypatch):
    saver.save(TrainState(step=3), {}, wait=True)
    spoil(monkeypatch, folder, "stage", AssertionError("staged again"))
    saver.save(TrainState(step=3), {}, wait=True)
    assert saver.newest == 3


def test_what_is_large_is_written_in_several_files(saver, monkeypatch):
    monkeypatch.setattr("clm_dist.training.saver.FILE_BYTES", 30)  # of 60 bytes of weights, 128 of the optimizer
    saver.save(TrainState(step=1), {}, wait=True)
    [one] = folder.checkpoints(saver.folder)
    assert sum(name.startswith("model-") for name in one.files()) == 2
    assert sum(name.startswith("optimizer-") for name in one.files()) == 4
    assert torch.equal(content.read(one, "model").read("bias", 0, 3), saver.engine.plain.bias)
