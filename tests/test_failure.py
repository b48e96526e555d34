"""One rank is named as the cause, whoever else fails because of it; and one exit code is written down."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from clm_dist.errors import RunError
from clm_dist.watch import beats, failure
from clm_dist.watch.beats import Beat, Observation
from clm_dist.watch.failure import FAILURE, FORMER, Failure, claim, describe, hostname, lost_a_peer, set_aside
from clm_dist.watch.outcome import VARIABLE, write_outcome

FAILED = Failure(
    rank=1, host="node7", pid=5, phase="evaluation", step=30, error="ValueError: no", traceback="...", since=1.0,
    time=2.0, world_size=4,
)  # fmt: skip


def test_a_failure_comes_back_and_says_itself_in_a_line(tmp_path):
    assert claim(tmp_path / "run", FAILED, began=time.time() - 60)
    assert failure.read(tmp_path / "run") == FAILED
    assert FAILED.line() == "rank 1 of 4 on node7, evaluation at step 30: ValueError: no"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FAILURE]  # nothing else is left


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"rank": 1, "other": 2}'])
def test_what_is_no_failure_is_read_as_none(tmp_path, content):
    if content is not None:
        (tmp_path / FAILURE).write_text(content)
    assert failure.read(tmp_path) is None


def at_once(count, function):
    """The results of so many threads that begin together."""
    barrier, results = threading.Barrier(count), [None] * count

    def work(number):
        barrier.wait()
        results[number] = function(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return results


@pytest.mark.parametrize("attempt", range(10))
def test_one_of_many_at_once_is_the_cause(tmp_path, attempt):
    began = time.time() - 60
    first = at_once(16, lambda rank: claim(tmp_path, replace(FAILED, rank=rank), began))
    assert sorted(first) == [False] * 15 + [True]
    assert failure.read(tmp_path).rank == first.index(True)
    assert not claim(tmp_path, FAILED, began)


def of_an_earlier_start(tmp_path):
    """A failure of rank 3 that is an hour old."""
    claim(tmp_path, replace(FAILED, rank=3), began=0.0)
    os.utime(tmp_path / FAILURE, (time.time() - 3600,) * 2)


def former(tmp_path):
    return [json.loads(path.read_text())["rank"] for path in (tmp_path / FORMER).iterdir()]


def test_what_an_earlier_start_left_is_set_aside(tmp_path):
    of_an_earlier_start(tmp_path)
    assert claim(tmp_path, FAILED, began=time.time() - 60)
    assert failure.read(tmp_path).rank == 1
    assert former(tmp_path) == [3]
    assert not claim(tmp_path, replace(FAILED, rank=2), began=time.time() - 60)


def test_setting_aside_keeps_what_was_there(tmp_path):
    set_aside(tmp_path)  # nothing there
    assert list(tmp_path.iterdir()) == []
    of_an_earlier_start(tmp_path)
    set_aside(tmp_path)
    assert failure.read(tmp_path) is None
    assert former(tmp_path) == [3]


@pytest.mark.parametrize("attempt", range(10))
def test_one_of_many_at_once_after_an_earlier_start(tmp_path, attempt):
    of_an_earlier_start(tmp_path)
    began = time.time() - 60
    first = at_once(16, lambda rank: claim(tmp_path, replace(FAILED, rank=100 + rank), began))
    assert sorted(first) == [False] * 15 + [True]
    assert failure.read(tmp_path).rank == 100 + first.index(True)
    assert former(tmp_path) == [3]


class DistBackendError(RuntimeError):
    """As torch.distributed's, which this wing does not know."""


class DistNetworkError(RuntimeError):
    pass


class DerivedError(DistBackendError):
    pass


LOST = [
    DerivedError("anything"),
    DistNetworkError("failed to recv, got 0 bytes"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
    RuntimeError("NCCL communicator was aborted on rank 1."),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
]
OWN = [
    ValueError("gloo is a word"),
    RuntimeError("CUDA out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    RunError("NCCL is a word here, too"),
    KeyError("TCPStore"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_who_lost_a_peer_is_a_victim(error):
    assert lost_a_peer(error)


@pytest.mark.parametrize("error", OWN, ids=str)
def test_other_errors_are_causes(error):
    assert not lost_a_peer(error)


def noted():
    error = ValueError("the cause")
    error.add_note("and a note")
    return error


DESCRIBED = [
    (ValueError("no such\n  thing"), "ValueError: no such thing"),
    (RunError("said plainly"), "said plainly"),
    (ZeroDivisionError(), "ZeroDivisionError"),
    (KeyError("x"), "KeyError: 'x'"),
    (noted(), "ValueError: the cause and a note"),
]


@pytest.mark.parametrize(("error", "line"), DESCRIBED, ids=[line for _, line in DESCRIBED])
def test_errors_in_a_line(error, line):
    try:
        raise error
    except Exception as caught:
        found, text = describe(caught)
    assert found == line
    assert text.startswith("Traceback") and "raise error" in text


NOW = Beat(
    rank=0, host=hostname(), pid=os.getpid(), number=1, phase="training", step=5, micro_step=0, place="data",
    since=0.0, stack="",
)  # fmt: skip
WAITING = "waiting for the others"


def show(folder, *signs):
    """Signs of life of ranks 0, 1, ...: what differs from NOW."""
    for rank, sign in enumerate(signs):
        beats.write(folder, replace(NOW, **{"rank": rank, "since": time.time() - 40, **sign}))


def judged(folder, *signs, patience=60.0):
    show(folder, *signs)
    return Observation(folder).judge(patience)


@pytest.fixture(scope="module")
def ended():
    """Number of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_nobody_is_judged_where_nobody_shows_life(tmp_path):
    assert Observation(tmp_path / "nowhere").judge(1.0) is None


def test_an_ended_process_is_named_before_all_others(tmp_path, ended):
    found = judged(tmp_path, {"step": 1}, {"pid": ended, "step": 9, "place": WAITING})
    assert found.beat.rank == 1 and "its process is gone" in found.reason


def test_a_process_that_nobody_has_buried_is_gone_too(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert judged(tmp_path, {}, {"pid": child.pid}).beat.rank == 1


def test_numbers_of_processes_elsewhere_mean_nothing_here(tmp_path, ended):
    found = judged(tmp_path, {"place": WAITING}, {"pid": ended, "host": "another"})
    assert "no progress for 40 s (data)" in found.reason


def test_a_silent_rank_is_named_although_it_is_ahead(tmp_path):
    show(tmp_path, {"step": 1}, {"step": 9})
    seen = Observation(tmp_path)
    seen.look()
    time.sleep(0.2)
    show(tmp_path, {"step": 1, "number": 2})  # rank 0 alone lives on
    assert "no progress" in seen.judge(patience=5.0).reason  # not silent for long enough
    found = seen.judge(patience=0.1)
    assert found.beat.rank == 1 and found.reason.startswith("no sign of life for 0 s")


def test_a_rank_is_not_silent_at_first_sight(tmp_path):
    assert "no progress" in judged(tmp_path, {}, {}, patience=0.1).reason


BEHIND = [  # signs of ranks; who holds up the others
    ([{}, {"step": 4}], 1),
    ([{"micro_step": 1}, {"micro_step": 0}], 1),
    ([{"place": "update"}, {"place": "forward and backward"}, {"place": "update"}], 1),
    ([{"place": "forward and backward"}, {"place": "data"}], 1),
    ([{"place": WAITING, "step": 4}, {"place": "update", "step": 5}], 1),  # who waits is never to blame
    ([{"place": WAITING}, {"place": WAITING, "step": 1}, {"place": "data", "step": 9, "micro_step": 3}], 2),
    ([{"place": WAITING}, {"place": "saving"}], 1),
    ([{"place": WAITING}, {"place": "waiting for the disk"}], 1),
]


@pytest.mark.parametrize(("signs", "rank"), BEHIND)
def test_the_one_furthest_behind_is_named(tmp_path, signs, rank):
    found = judged(tmp_path, *signs)
    assert found.beat.rank == rank
    assert found.reason == f"no progress for 40 s ({found.beat.place})"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"rank": 1}', b"\x80"])
def test_half_a_sign_of_life_is_none(tmp_path, content):
    show(tmp_path, {})
    (tmp_path / "rank-00001.json").write_bytes(content)
    assert list(beats.read(tmp_path)) == [0]


@pytest.mark.parametrize(("codes", "kept"), [
    ([0], "0"),
    ([1], "1"),
    ([0, 1], "1"),
    ([1, 0], "1"),
    ([75, 1], "75"),
    ([1, 75], "1"),
    ([0, 0, 130, 1, 0], "130"),
])  # fmt: skip
def test_the_first_who_fails_says_how_it_ended(tmp_path, codes, kept):
    for code in codes:
        write_outcome(code, {VARIABLE: str(tmp_path / "outcome")})
    assert (tmp_path / "outcome").read_text() == f"{kept}\n"


def test_many_at_once_write_one_outcome(tmp_path):
    at_once(16, lambda number: write_outcome(number, {VARIABLE: str(tmp_path / "outcome")}))
    assert (tmp_path / "outcome").read_text() in {f"{number}\n" for number in range(1, 16)}


@pytest.mark.parametrize("environment", [{}, {VARIABLE: ""}])
def test_no_outcome_where_none_is_asked_for(tmp_path, monkeypatch, environment):
    monkeypatch.chdir(tmp_path)
    write_outcome(1, environment)
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_is_told_0_of_a_run_that_saved_and_left_if_a_script_reads_the_file(tmp_path):
    environment = {VARIABLE: str(tmp_path / "outcome"), "LOCAL_RANK": "1"}
    assert [write_outcome(code, environment) for code in (0, 75, 130, 1, 2)] == [0, 0, 0, 1, 2]
    assert write_outcome(75, {"LOCAL_RANK": "1"}) == 75  # nobody would know
    assert (tmp_path / "outcome").read_text() == "75\n"
