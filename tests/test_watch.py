"""The thread beside training: what it takes for a wish to stop, and what it leaves alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from clm_dist.watch import beats
from clm_dist.watch.watch import FOLDER, Watch

LISTENS = """
import signal, sys, time
from clm_dist.watch.watch import Watch
watch = Watch(); watch.start(); watch.may_leave = {may_leave}
signal.signal(signal.SIGCHLD, lambda *_: None)  # as a library may
print("ready", flush=True)
time.sleep(1.5)
print(watch.reason, watch.interrupted, flush=True)
"""


def listener(number, may_leave=False):
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENS.format(may_leave=may_leave)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out.split()


@pytest.mark.parametrize(
    ("number", "heard"),
    [
        (signal.SIGTERM, ["SIGTERM", "False"]),
        (signal.SIGUSR1, ["SIGUSR1", "False"]),
        (signal.SIGUSR2, ["SIGUSR2", "False"]),
        (signal.SIGINT, ["SIGINT", "True"]),
        (signal.SIGCHLD, ["None", "False"]),  # somebody else's business
    ],
)
def test_signals(number, heard):
    assert listener(number) == (0, heard)


def test_where_nothing_can_be_lost_it_leaves_at_once():
    assert listener(signal.SIGTERM, may_leave=True) == (75, [])
    assert listener(signal.SIGINT, may_leave=True) == (130, [])


def test_one_that_was_never_started_never_blocks():
    watch = Watch()
    for _ in range(100_000):  # more than a pipe holds
        watch.enter("saving", 3)
    assert (watch.phase, watch.step) == ("saving", 3)


@pytest.mark.parametrize(("phase", "named"), [("preparing", False), ("training", True)])
def test_who_fetches_weights_may_take_its_time(tmp_path, monkeypatch, phase, named):
    """Before training a rank may be busy for long; its silence is another thing."""
    left = []
    monkeypatch.setattr(Watch, "_leave", lambda self, message, code: left.append(message))
    watch = Watch()
    (tmp_path / FOLDER).mkdir()
    beat = beats.Beat(0, "elsewhere", os.getpid(), 1, phase, 0, 0, "starting", time.time(), "")
    beats.write(tmp_path / FOLDER, beat)
    watch.join(tmp_path, limit=10)
    watch.phase = phase
    watch._look_for_the_stuck(watch._moved + 9)
    assert bool(left) == named


def test_a_rank_killed_on_another_machine_is_named_by_the_one_that_lost_it(tmp_path, monkeypatch):
    """Its process cannot be looked up from here; that it shows no life any more can be seen."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    watch, folder, over = Watch(), tmp_path / FOLDER, threading.Event()
    folder.mkdir()
    watch.join(tmp_path, 600)
    beats.write(folder, beats.Beat(1, "another-machine", 1, 7, "training", 3, 0, "data", time.time(), ""))

    def live():  # as the thread of this process would
        while not over.wait(0.2):
            watch._beat()

    mine = threading.Thread(target=live)
    mine.start()
    line = watch.failed(RuntimeError("[gloo] Connection closed by peer"))
    over.set()
    mine.join()
    assert line.startswith("rank 1 of 2 on another-machine, training at step 3: no sign of life for"), line
