"""metrics.jsonl as it is written, and what of it counts as not sent: across resumes that cut it, each step once."""

import json
import os

from conftest import read_rows

from clm_dist.publish.rows import MetricsFile, Unsent, waiting

TRAIN, EVAL = {"train/loss": 1.5, "perf/seconds_per_step": 0.1}, {"eval/loss": 2.5}


def write(run, *rows, name="metrics.jsonl"):
    with (run / name).open("a") as file:
        for step, values in rows:
            file.write(json.dumps({"step": step, "time": 1.0, **values}) + "\n")


def steps(rows):
    return [(row.step, sorted(row.kinds)) for row in rows]


def send(unsent, ended=False):
    rows = unsent.rows(ended)
    for row in rows:
        unsent.mark(row)
    return steps(rows)


def test_a_row_is_on_disk_when_it_is_logged(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log({"train/loss": 1.5, "train/grad_norm": float("nan")}, step=3)
    [row] = read_rows(tmp_path / "metrics.jsonl")  # not closed yet
    assert (row["step"], row["train/loss"], row["train/grad_norm"]) == (3, 1.5, None)
    metrics.finish()


def test_a_step_is_sent_in_one_row_once_a_later_one_stands_there(tmp_path):
    unsent = Unsent(tmp_path, {})
    assert unsent.rows(ended=False) == []
    write(tmp_path, (0, EVAL), (1, TRAIN))
    assert send(unsent) == [(0, ["eval"])]
    write(tmp_path, (1, EVAL))
    write(tmp_path, (1, {"prompt": "the", "text": "cat"}), name="samples.jsonl")
    assert send(unsent) == []  # who knows what else of step 1 comes
    write(tmp_path, (2, TRAIN))
    [row] = unsent.rows(ended=False)
    assert row.figures == {**TRAIN, **EVAL} and [sample["text"] for sample in row.samples] == ["cat"]
    unsent.mark(row)
    assert send(unsent, ended=True) == [(2, ["train"])]
    assert send(unsent, ended=True) == []


def test_steps_that_are_computed_again_are_not_sent_again(tmp_path):
    unsent = Unsent(tmp_path, {})
    write(tmp_path, (1, TRAIN), (2, TRAIN))
    checkpoint = (tmp_path / "metrics.jsonl").stat().st_size
    write(tmp_path, (3, TRAIN), (4, TRAIN))
    assert [step for step, _ in send(unsent)] == [1, 2, 3]
    os.truncate(tmp_path / "metrics.jsonl", checkpoint)
    write(
        tmp_path, *((step, {**TRAIN, "train/loss": 9.5}) for step in range(3, 8))
    )  # longer than before when looked at
    assert [step for step, _ in send(unsent, ended=True)] == [4, 5, 6, 7]
    assert send(Unsent(tmp_path, {"train": 5}), ended=True) == [(6, ["train"]), (7, ["train"])]


def test_what_a_kill_left_out_of_a_sent_step_is_sent_by_itself(tmp_path):
    """Killed between the loss of a step and its evaluation; the next start evaluates."""
    write(tmp_path, (1, TRAIN), (2, TRAIN))
    unsent = Unsent(tmp_path, {})
    assert send(unsent, ended=True) == [(1, ["train"]), (2, ["train"])]
    write(tmp_path, (2, EVAL), (3, TRAIN))
    assert send(unsent, ended=True) == [(2, ["eval"]), (3, ["train"])]


def test_a_line_that_is_being_written_waits(tmp_path):
    unsent = Unsent(tmp_path, {})
    write(tmp_path, (1, TRAIN))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time"')
        file.flush()
        assert [row.step for row in unsent.rows(ended=True)] == [1]
        file.write(': 1.0, "train/loss": 3.5}\n')
    assert [row.step for row in unsent.rows(ended=True)] == [1, 2]


def test_what_waits_is_said_in_words(tmp_path):
    assert waiting(tmp_path, {}) is None
    write(tmp_path, (10, TRAIN), (20, TRAIN), (30, TRAIN))
    assert waiting(tmp_path, {}) == "3 rows have not arrived (steps 10 to 30)"
    assert waiting(tmp_path, {"train": 20}) == "1 rows have not arrived (step 30)"
    assert waiting(tmp_path, {"train": 30}) is None
