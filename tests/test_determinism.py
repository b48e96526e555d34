"""Kernels that give the same bits every time: asked for around forward and backward, on a GPU alone.

That they do is measured where there is a GPU (benchmarks/gpu.py, part `resume`); here, what is asked of torch.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from conftest import TINY_MODEL, prepare_recipe

from clm_dist import recipe
from clm_dist.engine.replicated import Replicated
from clm_dist.errors import UserError
from clm_dist.model.objective import Objective
from clm_dist.training import train as training
from clm_dist.training.determinism import reserve_workspace, same_bits


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("wanted", [True, False])
def test_only_within(gpu, wanted):
    with same_bits(wanted):
        assert torch.are_deterministic_algorithms_enabled() is wanted
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention would take the other kernel
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_cpu_is_left_alone():
    with same_bits(True):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_has_no_such_kernel(gpu):
    words = "scatter_reduce_cuda does not have a deterministic implementation, but you set 'torch.use_deterministic...'"
    told = r"^the model uses scatter_reduce_cuda, .*set train.deterministic=false"
    with pytest.raises(UserError, match=told), same_bits(True):
        raise RuntimeError(words)
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass(gpu):
    with pytest.raises(RuntimeError, match="out of memory"), same_bits(True):
        raise RuntimeError("out of memory")


def test_the_workspace_is_a_users_if_he_gave_one(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    reserve_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    reserve_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("wanted", [True, False])
def test_every_forward_and_backward_of_training_is_within(tmp_path, monkeypatch, wanted):
    within, passes = [], []

    @contextmanager
    def recorded(given):
        within.append(given)
        yield
        within.pop()

    def noted(function, name):
        def call(*args, **kwargs):
            passes.append((name, *within))
            return function(*args, **kwargs)

        return call

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(training, "same_bits", recorded)
    monkeypatch.setattr(Objective, "summed", noted(Objective.summed, "forward"))
    monkeypatch.setattr(Replicated, "backward", noted(Replicated.backward, "backward"))
    train = {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "mixed_precision": "no"}
    train["deterministic"] = wanted
    training.train(recipe.load(prepare_recipe(tmp_path, 40, model=TINY_MODEL, train=train), []))
    assert passes == 4 * [("forward", wanted), ("backward", wanted)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # before the first product
