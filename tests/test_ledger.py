"""Each row seals those before it; the history of a run is what counts in the end; its time adds up."""

import json

import numpy as np
import pytest
from handmade import Moment, Run

from clm_dist.ledger.goodput import CAUSES, goodput, table
from clm_dist.ledger.history import history
from clm_dist.ledger.ledger import TAIL, Ledger, block_digest, digest_of, last_row, next_consumed, read, rewound


@pytest.fixture
def path(tmp_path):
    """A ledger of four rows: x is 0, 1, 2, 3."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(4):
        ledger.write("other", x=number)
    return tmp_path / "ledger.jsonl"


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def test_rows_read_back_in_order(path):
    rows, problems = read(path)
    assert problems == []
    assert [(row["event"], row["x"]) for row in rows] == [("other", number) for number in range(4)]
    assert last_row(path)["x"] == 3


def test_a_ledger_opened_again_goes_on(path):
    Ledger(path).write("other", x=4)
    rows, problems = read(path)
    assert problems == [] and [row["x"] for row in rows] == [0, 1, 2, 3, 4]


CHANGES = {  # what is done to the rows, and the numbers of those that no longer follow
    "changed": (lambda rows: [rows[0], rows[1].replace(b'"x": 1', b'"x": 7'), *rows[2:]], [2]),
    "another time": (lambda rows: [rows[0].replace(b'"time": 1', b'"time": 2'), *rows[1:]], [1]),
    "removed": (lambda rows: [rows[0], *rows[2:]], [2]),
    "first removed": (lambda rows: rows[1:], [1]),
    "swapped": (lambda rows: [rows[0], rows[2], rows[1], rows[3]], [2, 3, 4]),
    "doubled": (lambda rows: [rows[0], rows[0], *rows[1:]], [2]),
    "no longer JSON": (lambda rows: [rows[0], b"\x80\n", *rows[2:]], [2, 3]),
    "no object": (lambda rows: [rows[0], b"[]\n", *rows[2:]], [2, 3]),
    "half of it": (lambda rows: [*rows[:3], rows[3][:-9]], [4]),
    "a chain of its own": (lambda rows: [*rows, b'{"event": "other", "time": 1, "chain": "0"}\n'], [5]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_rows_is_seen_where_it_was_done(path, change):
    function, numbers = CHANGES[change]
    path.write_bytes(b"".join(function(lines_of(path))))
    _, problems = read(path)
    assert [int(problem.split()[2]) for problem in problems] == numbers


def test_rows_taken_from_the_end_are_not_seen(path):
    """What a chain cannot show; the checkpoints do, which remember what was consumed (test_audit.py)."""
    path.write_bytes(b"".join(lines_of(path)[:-1]))
    assert read(path)[1] == []


def test_half_a_row_at_the_end_is_mended_wherever_it_was_cut(path):
    *before, last = lines_of(path)
    for size in range(len(last)):  # the whole row, but for its line end, is half a row too
        path.write_bytes(b"".join(before) + last[:size])
        Ledger(path).write("other", x=9)
        rows, problems = read(path)
        assert problems == [] and [row["x"] for row in rows] == [0, 1, 2, 9]


@pytest.mark.parametrize("size", [1, TAIL - 1, TAIL, 3 * TAIL])
def test_what_a_power_failure_leaves_at_the_end_is_mended(path, size):
    """The file has its length, but its last part was never written."""
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(size))
    assert last_row(path)["x"] == 3
    Ledger(path).close()
    assert path.read_bytes() == whole


def test_after_a_damaged_last_row_it_goes_on_and_only_that_one_is_named(path):
    path.write_bytes(path.read_bytes() + b"\0\0\n")
    for number in (4, 5):
        Ledger(path).write("other", x=number)
    rows, problems = read(path)
    assert problems == ["ledger row 5 is damaged"] and [row["x"] for row in rows] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("wrong", [
    {"step": "1"}, {"step": True}, {"from": 0.5}, {"data_seconds": None}, {"digest": None},
])  # fmt: skip
def test_a_row_without_the_numbers_that_others_count_with_is_named(path, wrong):
    values = {"step": 1, "from": 0, "to": 4, "digest": 9, "update": True, "consumed": "", "data_seconds": 0.1}
    Ledger(path).write("step", **{**values, **wrong})
    assert read(path)[1] == ["ledger row 5 (step) lacks what it needs"]


@pytest.mark.parametrize("content", [b"", b'{"event"', b"\n"])
def test_a_ledger_that_holds_no_row_yet(tmp_path, content):
    path = tmp_path / "ledger.jsonl"
    assert last_row(path) is None
    path.write_bytes(content)
    assert last_row(path) is None
    path.write_bytes(content.rstrip(b"\n"))
    Ledger(path).write("other")
    assert len(read(path)[0]) == 1 and read(path)[1] == []


def test_the_last_row_of_a_long_file_is_found_in_its_tail(path):
    with path.open("r+b") as file:  # a terabyte of nothing in front: reading it would take hours
        last = lines_of(path)[-1]
        file.truncate(2**40)
        file.seek(2**40)
        file.write(b"\n" + last)
    assert last_row(path)["x"] == 3
    Ledger(path)
    assert path.stat().st_size == 2**40 + 1 + len(last) > TAIL


def test_a_digest_goes_by_content_and_not_by_order():
    assert digest_of(np.array([3, 1, 2])) == digest_of(np.array([1, 2, 3]))
    parts = digest_of(np.array([1])) + digest_of(np.array([2, 3]))
    assert digest_of(np.array([1, 2, 3])) == parts % 2**40  # what ranks add up
    others = [[1, 2], [1, 2, 4], [1, 2, 2], [0, 3, 3], [1, 2, 3, 0], []]
    assert len({digest_of(np.array(blocks, dtype=np.int64)) for blocks in [*others, [1, 2, 3]]}) == 7
    assert digest_of(np.array([], dtype=np.int64)) == 0
    # SplitMix64 from state 0 gives e220a8397b1dcdaf first (Vigna's splitmix64.c); the highest 40 bits of it
    assert block_digest(np.array([0])).tolist() == [0xE220A8397B] == [digest_of(np.array([0]))]


def test_consumed_goes_by_everything_that_was_learned_from():
    rows = [("", 1, 0, 4, 9, True), ("x", 1, 0, 4, 9, True), ("", 2, 0, 4, 9, True), ("", 1, 1, 4, 9, True)]
    rows += [("", 1, 0, 5, 9, True), ("", 1, 0, 4, 8, True), ("", 1, 0, 4, 9, False)]
    hashes = {next_consumed(*row) for row in rows}
    assert len(hashes | {rewound("", 1, 0), rewound("", 1, 1), rewound("", 2, 0), rewound("x", 1, 0)}) == 11


def past_of(run):
    rows, problems = read(run.path / "ledger.jsonl")
    assert problems == []
    return history(rows)


def of(rows):
    return [row["step"] for row in rows]


def lost(past):
    return [(row["step"], cause) for row, cause in past.lost]


def test_an_uninterrupted_run(tmp_path):
    past = past_of(Run(tmp_path).start().steps(3))
    assert (of(past.steps), past.lost, past.passed_over, past.rewinds, past.problems) == ([1, 2, 3], [], [], 0, [])
    assert [list(past.reached[step].values()) for step in range(4)] == [[0], [4], [8], [12]]


def test_steps_after_the_checkpoint_are_lost_and_consumed_is_the_same(tmp_path):
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    for folder in (whole, broken):
        folder.mkdir()
    expected = Run(whole).start().steps(5).now.consumed
    run = Run(broken).start().steps(2)
    saved = run.now
    run.steps(2).start(saved).steps(1).start(saved).steps(3)
    past = past_of(run)
    assert run.now.consumed == expected
    assert (of(past.steps), len(past.starts), past.problems) == ([1, 2, 3, 4, 5], 3, [])
    assert lost(past) == [(3, "start"), (4, "start"), (3, "start")]


def test_a_rewind_passes_data_over(tmp_path):
    run = Run(tmp_path).start().steps(2)
    saved = run.now
    past = past_of(run.steps(1).rewind(saved).steps(2))  # back while step 4 was done, which read 12 to 15
    assert (of(past.steps), past.passed_over, past.rewinds) == ([1, 2, 3, 4], [(8, 16)], 1)
    assert lost(past) == [(3, "rewind")]
    assert [row["from"] for row in past.steps] == [0, 4, 16, 20]
    assert past.problems == []


def test_rewinds_to_one_checkpoint_again_and_again(tmp_path):
    """It is not saved anew in between: each goes back to the same state, and past more data."""
    run = Run(tmp_path).start().steps(2)
    saved = run.now
    past = past_of(run.rewind(saved).steps(1).rewind(saved).rewind(saved).steps(1))
    assert (of(past.steps), lost(past), past.rewinds, past.problems) == ([1, 2, 3], [(3, "rewind")], 3, [])
    assert past.passed_over == [(8, 24)]  # of 8 to 11, 12 to 15, 16 to 19 and 20 to 23 nothing is in the weights


def test_a_kill_after_a_rewind_goes_back_behind_it(tmp_path):
    run = Run(tmp_path).start().steps(2)
    saved = run.now
    passed = run.rewind(saved).now
    past = past_of(run.steps(2).start(saved).steps(1))
    assert (of(past.steps), past.passed_over, past.problems) == ([1, 2, 3], [], [])
    assert lost(past) == [(3, "start"), (4, "start")]
    # what the rewind had passed over was read after all: nobody can be where it had gone on from any more
    assert past_of(run.start(passed)).problems == ["a start at step 2 goes on from what this run never was"]


def test_a_checkpoint_after_a_rewind_keeps_it(tmp_path):
    run = Run(tmp_path).start().steps(2)
    run.rewind(run.now).steps(1)
    saved = run.now
    past = past_of(run.steps(1).start(saved).steps(1))
    assert (of(past.steps), past.passed_over, past.problems) == ([1, 2, 3, 4], [(8, 12)], [])


def test_a_run_that_goes_on_from_another_one_begins_there(tmp_path):
    past = past_of(Run(tmp_path).start(Moment(5, 20, "abc")).steps(2))
    assert (past.first, of(past.steps), past.problems) == (5, [6, 7], [])


STRANGE = [Moment(1, 4, "other"), Moment(1, 5), Moment(7, 28, "abc")]


@pytest.mark.parametrize("at", STRANGE)
def test_a_start_that_goes_on_from_what_never_was(tmp_path, at):
    run = Run(tmp_path).start().steps(1)
    wrong = at if at.consumed else Moment(1, 5, run.now.consumed)
    past = past_of(run.steps(2).start(wrong))
    assert past.problems == [f"a start at step {at.step} goes on from what this run never was"]


def test_a_start_from_steps_that_were_taken_back(tmp_path):
    run = Run(tmp_path).start().steps(1)
    saved = run.now
    taken_back = run.steps(1).now
    past = past_of(run.rewind(saved).steps(1).start(taken_back))
    assert past.problems == ["a start at step 2 goes on from what this run never was"]


def test_a_rewind_to_what_never_was(tmp_path):
    past = past_of(Run(tmp_path).start().steps(2).rewind(Moment(1, 4, "other")))
    assert past.problems == ["a rewind goes back to step 1, which this run never reached so"]


def timed(event, time, **values):
    return {"event": event, "time": time, "consumed": "", "cursor": 0, "from": 0, "to": 0, "digest": 0, **values}


def step_row(time, step, seconds, data_seconds):
    return timed("step", time, step=step, seconds=seconds, data_seconds=data_seconds, update=True)


TIMES = [  # two starts: the first is killed after step 2, whose work is lost
    timed("start", 110.0, began=100.0, step=0),
    timed("evaluation", 115.0, step=0, seconds=5.0),
    step_row(125.0, 1, seconds=9.0, data_seconds=2.0),
    timed("save", 128.0, step=1, seconds=3.0),
    step_row(136.0, 2, seconds=8.0, data_seconds=1.0),
    timed("start", 170.0, began=156.0, step=1),
    step_row(180.0, 2, seconds=10.0, data_seconds=4.0),
    timed("export", 187.0, step=2, seconds=6.0),
    timed("end", 187.5, step=2, state="finished"),
]  # start-up: 100 to 116, when step 1 began, but for 5 of the evaluation; and 156 to 170
BY_CAUSE = {
    "training": 13.0, "data": 6.0, "evaluation": 5.0, "save": 3.0, "export": 6.0, "start-up": 25.0, "lost work": 8.0,
    "not running": 20.0, "other": 1.5,
}  # fmt: skip


def test_goodput_adds_up_to_the_wall_time():
    seconds = goodput(TIMES)
    assert seconds == pytest.approx(BY_CAUSE) and set(seconds) == set(CAUSES)
    assert sum(seconds.values()) == pytest.approx(187.5 - 100.0)
    assert table(seconds).startswith("goodput 14.9% of 87.5 s\n")  # 13 / 87.5


def test_goodput_of_every_beginning_of_a_run_adds_up():
    for count in range(1, len(TIMES) + 1):
        assert sum(goodput(TIMES[:count]).values()) == pytest.approx(TIMES[count - 1]["time"] - 100.0)


def test_goodput_of_a_rewind_and_of_a_withheld_update_is_lost_work():
    rows = [*TIMES[:5], timed("rewind", 139.0, step=1)]
    assert goodput(rows)["lost work"] == 8.0 + 3.0  # step 2, and step 3 that was given up
    assert goodput([*TIMES[:2], {**TIMES[2], "update": False}])["lost work"] == 9.0


def test_goodput_of_a_process_that_begins_before_the_last_one_left():
    """It waits for it: no second is counted twice."""
    rows = [*TIMES[:5], {**TIMES[5], "began": 130.0}, *TIMES[6:]]
    assert sum(goodput(rows).values()) == pytest.approx(87.5) and goodput(rows)["not running"] == 0


def test_goodput_of_nothing():
    assert goodput([]) == dict.fromkeys(CAUSES, 0.0)
    assert table(goodput([])).startswith("goodput: nothing has run\n")
    assert json.dumps(goodput(TIMES))
