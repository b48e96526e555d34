"""What a node of a job does: finds its surroundings out, passes signals on, copies data, names what went wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml

from clm_dist.cluster import stage
from clm_dist.cluster.environment import PATIENCE, PORTS, free_port, offline, port_of, reachable, settings
from clm_dist.cluster.task import Messenger, command_of, hears
from clm_dist.data import prepared as prepared_data
from clm_dist.errors import RunError, UserError
from clm_dist.recipe import load

JOB = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_jobs_and_their_starts_begin_at_other_ports():
    ports = [port_of(job, restart) for job in range(1000, 1100) for restart in range(3)]
    assert len(set(ports)) == len(ports) and all(port in PORTS for port in ports)
    assert port_of(2**31, 100) in PORTS


def test_a_port_that_is_taken_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("", free_port(port_of(os.getpid(), 0))))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) not in (port, None)


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        ({"SLURM_CPUS_PER_TASK": "64", "SLURM_CPUS_ON_NODE": "128"}, 8, "8"),
        ({"SLURM_CPUS_ON_NODE": "6"}, 4, "1"),
        ({}, 4, "1"),
    ],
)
def test_cores_are_shared_by_the_processes_of_a_node(monkeypatch, given, processes, expected):
    monkeypatch.setattr("clm_dist.cluster.environment.first_host", lambda _: "n1")
    assert settings({**JOB, **given}, processes)["OMP_NUM_THREADS"] == expected


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr("clm_dist.cluster.environment.first_host", lambda _: "n1")
    found = settings({**JOB, "SLURM_CPUS_PER_TASK": "8"}, 2)
    assert found["OMP_NUM_THREADS"] == "4" and found["SRUN_CPUS_PER_TASK"] == "8" and found["MASTER_ADDR"] == "n1"
    assert "SIGUSR1" in found["PET_SIGNALS_TO_HANDLE"] and int(found["MASTER_PORT"]) in PORTS
    own = {"OMP_NUM_THREADS": "3", "MASTER_PORT": "1234", "NCCL_DEBUG": "INFO"}
    assert settings({**JOB, **own}, 2) | own == settings({**JOB, **own}, 2)
    assert not any(name.startswith("CUDA") for name in found)


def test_a_job_without_a_route_is_offline_and_says_so():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        there = f"http://127.0.0.1:{server.getsockname()[1]}"
        nowhere = "http://127.0.0.1:9"
        assert reachable([there, nowhere], {}) == {there: True, nowhere: False}
        found, line = offline({"HF_ENDPOINT": there, "WANDB_BASE_URL": nowhere})
        assert found == {"WANDB_MODE": "offline"} and "no route to 127.0.0.1: WANDB_MODE=offline" in line
        assert offline({"HF_ENDPOINT": there, "WANDB_BASE_URL": there}) == ({}, None)
        # what is set is not asked for
        assert offline({"HF_HUB_OFFLINE": "0", "WANDB_MODE": "online"}) == ({}, None)
        proxy = {"HTTPS_PROXY": there}
        assert reachable(["https://nowhere.invalid"], proxy) == {"https://nowhere.invalid": True}


def test_a_name_server_that_hangs_holds_nobody_up(monkeypatch):
    answers = threading.Event()

    def hang(*_, **__):
        answers.wait()
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    assert reachable(["https://a", "https://b"], {}) == {"https://a": False, "https://b": False}
    assert PATIENCE < 1
    answers.set()


def test_the_task_adds_the_number_of_its_node():
    assert command_of(["accelerate", "launch", "--x", "train"], "3") == [
        "accelerate",
        "launch",
        "--machine_rank",
        "3",
        "--x",
        "train",
    ]


LAUNCHER = """
import subprocess, sys, time
child = '''
import signal, time
time.sleep(1)
signal.signal(signal.SIGUSR1, lambda *_: (print("heard", flush=True), exit(0)))
time.sleep(60)
'''
rank = subprocess.Popen([sys.executable, "-c", child])
sys.exit(rank.wait())
"""


def test_a_signal_reaches_the_ranks_and_only_when_they_listen():
    """The launcher does not handle USR1 and would die of it; the rank would too, in its first second."""
    command = [sys.executable, "-m", "clm_dist.cluster.task", sys.executable, "-c", LAUNCHER, "launch"]
    task = subprocess.Popen(command, env={**os.environ, **JOB}, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: hears(task.pid, signal.SIGUSR1))
    task.send_signal(signal.SIGUSR1)
    task.send_signal(signal.SIGUSR1)  # twice is once
    out, _ = task.communicate(timeout=300)
    assert (task.returncode, out) == (0, "heard\n")


def test_a_launcher_that_fails_is_named_with_its_node():
    command = [sys.executable, "-m", "clm_dist.cluster.task", sys.executable, "-c", "raise SystemExit(3)", "launch"]
    done = subprocess.run(command, env={**os.environ, **JOB}, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and f"node {os.uname().nodename} (number 0): the launcher ended with 3" in done.stderr


KILLED = """
import subprocess, sys, time
from pathlib import Path
from clm_dist.watch import beats, failure
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
position = (7, "training", 12, 1, "data", {since}, "its stack")
(Path({run!r}) / ".watch").mkdir(parents=True)
for number in range({ranks}):
    beats.write(Path({run!r}) / ".watch", beats.Beat(number, failure.hostname(), rank.pid, *position))
rank.kill()
sys.exit(rank.wait() != 0)
"""


@pytest.mark.parametrize(
    ("since", "ranks", "told", "named"),
    [
        ("time.time()", 1, "", True),
        ("time.time()", 1, "75\n", False),
        ("time.time()", 2, "", False),
        ("0", 1, "", False),
    ],
)
def test_a_rank_that_was_killed_is_named_by_its_node(tiny, since, ranks, told, named):
    """Unless somebody has said how the run ended, signs of life are of an earlier start, or it may have been another one."""
    run, outcome = tiny / "run", tiny / "outcome"
    outcome.write_text(told)
    launcher = [sys.executable, "-c", KILLED.format(run=str(run), since=since, ranks=ranks)]
    launcher += ["launch", "--num_processes", "2", "-m", "clm_dist", "train"]
    command = [sys.executable, "-m", "clm_dist.cluster.task", *launcher, str(tiny / "recipe.yaml")]
    env = {**os.environ, **JOB, "CLM_DIST_OUTCOME": str(outcome)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the launcher ended with 1" in done.stderr
    assert ("rank 0 of 2 on" in done.stderr) == named == (run / "failure.json").exists(), done.stderr
    if named:
        assert json.loads((run / "failure.json").read_text())["error"].startswith("its process is gone")
        assert outcome.read_text() == "1\n"


def test_a_messenger_tells_each_rank_once(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    told = []
    monkeypatch.setattr(os, "kill", lambda *what: told.append(what))
    monkeypatch.setattr("clm_dist.cluster.task.children", lambda _: [11, 12])
    listening = {11}
    monkeypatch.setattr("clm_dist.cluster.task.hears", lambda pid, _: pid in listening)
    messenger = Messenger()
    messenger.waiting.add(signal.SIGUSR1)
    messenger.deliver(10)
    listening.add(12)
    messenger.deliver(10)
    messenger.deliver(10)
    assert told == [(11, signal.SIGUSR1), (12, signal.SIGUSR1)]


@pytest.fixture
def prepared(trained):
    return yaml.safe_load((trained / "recipe.yaml").read_text())["data"]["prepared_dir"]


def test_staged_data_is_read_from_there_and_taken_away(trained, prepared, tmp_path, monkeypatch):
    config = load(trained / "recipe.yaml", [])
    with stage.staged(prepared, {**JOB, "TMPDIR": str(tmp_path)}) as environment:
        copy = tmp_path / "clm-dist-7-0"
        assert environment[prepared_data.STAGED] == str(copy) and (copy / "train").is_dir()
        monkeypatch.setenv(prepared_data.STAGED, str(copy))
        manifest = prepared_data.open_prepared(config)
        opened = []
        monkeypatch.setattr(
            prepared_data, "Blocks", lambda folder: opened.append(folder) or range(manifest.splits["train"].blocks)
        )
        prepared_data.open_blocks(config, manifest, "train")
        assert opened == [copy / "train"]
    assert not copy.exists()
    with stage.staged(None, JOB) as environment:
        assert environment == JOB


def test_a_copy_of_other_data_is_refused(trained, prepared, tmp_path, monkeypatch):
    stage.copy(prepared_data.Path(prepared), tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    monkeypatch.setenv(prepared_data.STAGED, str(tmp_path / "copy"))
    config = load(trained / "recipe.yaml", [])
    with pytest.raises(UserError, match="is a copy of other data"):
        prepared_data.open_blocks(config, prepared_data.open_prepared(config), "train")


def test_a_damaged_file_is_not_staged(prepared, tmp_path):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    file = next(path for path in (damaged / "train").iterdir() if path.suffix == ".arrow")
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="is not what was written"):
        stage.copy(damaged, tmp_path / "copy")
