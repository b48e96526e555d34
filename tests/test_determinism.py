"""Kernels that give the same bits every time: asked for around forward and backward, on a GPU alone.

That they do is measured where there is a GPU (benchmarks/gpu.py, part `resume`); here, what is asked of torch.
"""

import os

import pytest
import torch

from clm_dist.errors import UserError
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
