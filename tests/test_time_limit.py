"""When a start of a run has to be over: the recipe's limit, Slurm's variable, or what squeue says."""

import math
import time

import pytest

from clm_dist.training.time_limit import slurm_end, time_limit


def test_the_recipe_counts_from_the_process(monkeypatch):
    now = time.time()
    left = time_limit(90, began=now - 30, environment={"SLURM_JOB_END_TIME": "1"}) - time.monotonic()
    assert left == pytest.approx(60, abs=2)


def test_no_limit():
    assert time_limit(None, time.time(), environment={}) == math.inf


def test_the_end_of_the_slurm_job():
    assert slurm_end({"SLURM_JOB_END_TIME": "1700000000", "SLURM_JOB_ID": "7"}) == 1700000000


@pytest.mark.parametrize(
    ("says", "end"),
    [
        ("2030-01-02T03:04:05", time.mktime((2030, 1, 2, 3, 4, 5, 0, 0, -1))),
        ("N/A", math.inf),
        ("", math.inf),
    ],
)
def test_squeue_is_asked_where_slurm_is_older(tmp_path, monkeypatch, says, end):
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$3" = 7 ] && echo "{says}"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm_end({"SLURM_JOB_ID": "7"}) == end


def test_no_squeue_is_no_limit(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm_end({"SLURM_JOB_ID": "7"}) == math.inf
