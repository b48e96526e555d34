"""A run folder that is what it says verifies; each way not to be is named."""

import json

import numpy as np
import pytest
from accelerate import skip_first_batches
from handmade import Moment, Run, planned
from torch.utils.data import DataLoader

from clm_dist.data.order import blocks_at
from clm_dist.ledger import audit as audits
from clm_dist.ledger import history as histories
from clm_dist.ledger.audit import audit, blocks_of, planned_counts
from clm_dist.ledger.goodput import goodput
from clm_dist.ledger.ledger import digest_of, next_consumed, read


def restarted(tmp_path):
    """Five steps, the last three of them twice: killed after step 4, saved at step 2."""
    run = Run(tmp_path).start().evaluate().steps(2)
    saved = run.now
    return run.steps(2).start(saved).steps(3).evaluate()


def problems_of(run, *arguments):
    return audit(run.write_metrics(), *arguments).problems


def test_a_run_with_a_restart_verifies(tmp_path):
    run = restarted(tmp_path)
    found = audit(run.write_metrics(), [("step-00000002", None)])
    assert found.problems == []
    assert found.lines == [
        "ledger: 9 rows, each sealed by the next",
        "data: 5 steps in 2 starts read 20 blocks: each of 10 blocks 2 times, as planned",
        "2 steps were done again (2 after restarts, 0 after rewinds), 0 updates withheld, 0 blocks passed over in 0 rewinds",
        "metrics: 2 training rows without gap, 2 evaluations, none twice",
        "checkpoints: 1 whole, their hashes reread",
    ]


def test_a_run_with_rewinds_verifies(tmp_path):
    run = Run(tmp_path).start().steps(2)
    saved = run.now
    run.steps(1).rewind(saved).steps(1).rewind(saved).steps(2)
    states = {0: "", 2: saved.consumed, 4: run.now.consumed}  # that of step 2 is of before the rewinds
    found = audit(run.write_metrics(), [], states)
    assert found.problems == []
    # step 3 read 8 to 11, step 4 failed on 12 to 15; then step 3 read 16 to 19, step 4 failed on 20 to 23
    assert found.lines[2].startswith("2 steps were done again (0 after restarts, 2 after rewinds), 0 updates withheld")
    assert found.lines[2].endswith("16 blocks passed over in 2 rewinds")


def test_withheld_updates_are_counted_and_read_all_the_same(tmp_path):
    found = audit(Run(tmp_path).start().steps(1).steps(1, update=False).write_metrics())
    assert found.problems == [] and "1 updates withheld" in found.lines[2]
    assert found.lines[1] == "data: 2 steps in 1 starts read 8 blocks: each of 10 blocks 0 or 1 times, as planned"


def test_a_run_that_goes_on_from_another_verifies(tmp_path):
    """Its first row of metrics reaches back into the other run."""
    run = Run(tmp_path).start(Moment(5, 20, "abc", unlogged=1)).steps(3)
    assert problems_of(run) == []


@pytest.mark.parametrize("steps", range(4))
def test_every_beginning_of_a_run_verifies(tmp_path, steps):
    assert problems_of(Run(tmp_path).start().steps(steps)) == []


def test_no_start(tmp_path):
    (tmp_path / "ledger.jsonl").touch()
    assert audit(tmp_path).problems == ["the ledger holds no start"]


@pytest.mark.parametrize(("step", "start", "count", "said"), [
    (2, 4, 4, "step 2 follows upon step 2"),
    (3, 4, 4, "step 3 reads from position 4, step 2 ended at 8"),  # honest about it: blocks seen twice, others not at all
    (3, 12, 4, "step 3 reads from position 12, step 2 ended at 8"),
    (4, 12, 4, "step 4 follows upon step 2"),
    (4, 12, 4, "blocks were not seen as often as planned"),
    (3, 8, 3, "step 3 read 3 blocks, not a global batch"),
])  # fmt: skip
def test_a_step_that_is_not_the_next_one(tmp_path, step, start, count, said):
    run = Run(tmp_path).start().steps(2)
    run.row(step, start, start + count, digest_of(planned(start)[:count]))
    assert any(said in problem for problem in problems_of(run))


def replaced(cursor):
    """The plan's blocks but for one."""
    blocks = planned(cursor).copy()
    blocks[1] = next(block for block in range(10) if block not in blocks)
    return blocks


@pytest.mark.parametrize("wrong", [replaced, lambda cursor: planned(cursor)[:3], lambda cursor: planned(cursor + 1)])
def test_a_block_replaced_left_out_or_shifted(tmp_path, wrong):
    run = Run(tmp_path).start().steps(1).steps(1, lambda now: wrong(now.cursor)).steps(1)
    assert problems_of(run) == ["step 2: the blocks that were read are not those of the plan"]


@pytest.mark.parametrize("piece", [1, 4, 9, 2**20])
def test_however_many_steps_are_looked_at_together(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(audits, "PIECE", piece)
    run = Run(tmp_path).start().steps(7).steps(1, lambda now: replaced(now.cursor)).steps(3)
    assert problems_of(run) == ["step 8: the blocks that were read are not those of the plan"]
    problems = problems_of(run.steps(8, lambda now: planned(now.cursor + 1)))
    assert len(problems) == 6 and problems[5] == "4 more steps read what the plan does not say"
    # 10 blocks in the order 4 9 1 2 8 0 3 7 6 5 with seed 42, the next pass begins with 7 5 2 1 3 8 (test_order.py)
    assert planned_counts([(2, 5)], 10, 42).tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 1, 0]
    assert planned_counts([(8, 12)], 10, 42).tolist() == [0, 0, 0, 0, 0, 2, 1, 1, 0, 0]
    assert planned_counts([(8, 30), (5, 5), (9, 2)], 10, 42).tolist() == [2, 2, 2, 2, 2, 3, 3, 2, 2, 2]
    assert planned_counts([(0, 10**15)], 10, 42).tolist() == [10**14] * 10  # no walk
    assert blocks_of(np.array([0, 15, 9, 10]), 10, 42).tolist() == [4, 8, 5, 7]


def other_plan(run, change, meant, **other):
    """A start with another plan, and one step by it."""
    run.PLAN = plan = {**run.PLAN, **change}
    start, size = run.start(changes=meant, **other).now.cursor, plan["global_batch_size"]
    run.row(run.now.step + 1, start, start + size, digest_of(blocks_at(start, size, plan["num_blocks"], plan["seed"])))
    return run


@pytest.mark.parametrize(("change", "field", "what"), [
    ({"seed": 8}, "seed", "seed from 7 to 8"),
    ({"global_batch_size": 2}, "train.global_batch_size", "global_batch_size from 4 to 2"),
    ({"num_blocks": 31}, "data.source", "num_blocks from 10 to 31"),
    ({"max_steps": 90}, "train.epochs", "max_steps from None to 90"),
    ({}, "data.text_column", "data from None to 1f"),
])  # fmt: skip
@pytest.mark.parametrize("said_so", [True, False])
def test_a_change_of_plan_is_meant_or_named(tmp_path, change, field, what, said_so):
    """Also where the blocks have the same numbers: other data is another run."""
    data = {} if change else {"data": "1f"}
    run = other_plan(Run(tmp_path).start().steps(2), change, [*([field] if said_so else []), "optim.lr"], **data)
    named = [f"a start at step 2 changed {what}: train.resume_changes does not say so"]
    assert problems_of(run) == ([] if said_so else named)


def test_a_change_that_was_never_saved_may_be_left_again(tmp_path):
    run = Run(tmp_path).start().steps(2)
    saved = run.now
    other_plan(run, {"seed": 8}, ["seed"])
    run.PLAN = Run.PLAN
    assert problems_of(run.start(saved).steps(2)) == []


@pytest.mark.parametrize(("step", "state", "said"), [
    (3, "finished", "the ledger says finished at step 3 of 4"), (3, "preempted", None), (4, "finished", None),
    (5, "finished", "the ledger goes up to step 5, beyond the 4 of the plan"),
])  # fmt: skip
def test_a_run_ends_with_its_last_step(tmp_path, step, state, said):
    run = Run(tmp_path)
    run.PLAN = {**Run.PLAN, "max_steps": 4}
    run.start().steps(step)._ledger.write("end", step=step, state=state)
    assert problems_of(run) == ([said] if said else [])


def test_a_row_forged_with_a_new_chain_shows_in_what_was_consumed(tmp_path):
    run = Run(tmp_path).start().steps(1)
    run.now = Moment(1, 4, next_consumed("", 1, 0, 4, 0, True), 1)  # of another step 1
    assert problems_of(run.steps(1)) == ["step 2: its hash of what was consumed is not that of the steps before it"]


@pytest.mark.parametrize("offset", range(11))
def test_no_flipped_bit_of_the_ledger_goes_unseen_or_stops_the_audit(tmp_path, offset):
    run = Run(tmp_path).start().steps(1)
    run.steps(1).rewind(run.now).steps(1).write_metrics()
    whole = (tmp_path / "ledger.jsonl").read_bytes()
    assert audit(tmp_path).problems == []
    for position in range(offset, len(whole), 11):
        data = bytearray(whole)
        data[position] ^= 1 << position % 7
        (tmp_path / "ledger.jsonl").write_bytes(data)
        assert audit(tmp_path).problems or json_equal(whole, data), position
        goodput(read(tmp_path / "ledger.jsonl")[0])  # shown beside the problems


def json_equal(one, other):
    """A space may become another sign without a meaning."""
    return [json.loads(line) for line in one.splitlines()] == [json.loads(line) for line in other.splitlines()]


METRICS = {  # what is done to the rows of five steps; what is said
    "missing": (lambda rows: [rows[1]], "a row covers steps 3 to 4, the one before ended at step 0"),
    "last missing": (lambda rows: rows[:1], "metrics end at step 2, the ledger at 5"),
    "doubled": (lambda rows: [rows[0], *rows], "a row covers steps 1 to 2, the one before ended at step 2"),
    "swapped": (lambda rows: rows[::-1], "a row covers steps 3 to 4, the one before ended at step 0"),
    "beyond": (lambda rows: [*rows, row(6, 2)], "metrics go up to step 6, the ledger to 5"),
    "overlapping": (lambda rows: [*rows, row(5, 2)], "a row covers steps 4 to 5, the one before ended at step 4"),
    "evaluated twice": (lambda rows: [evaluation(0), *rows, evaluation(0)], "an evaluation stands twice"),
    "evaluations swapped": (lambda rows: [evaluation(4), *rows, evaluation(2)], "an evaluation stands twice"),
    "evaluated beyond": (lambda rows: [*rows, evaluation(6)], "metrics go up to step 6, the ledger to 5"),
    "no object": (lambda rows: [*rows, 3], "metrics row 3 is damaged"),
    "no steps": (lambda rows: [rows[0], {"step": 4, "train/loss": 1.0}], "metrics row 2 is damaged"),
    "none at all": (lambda rows: [], "metrics end at step 0, the ledger at 5"),
}


def row(step, steps):
    return {"step": step, "train/loss": 1.0, "train/steps": steps}


def evaluation(step):
    return {"step": step, "eval/loss": 1.0}


@pytest.mark.parametrize("change", METRICS)
def test_metrics_with_gaps_and_overlaps(tmp_path, change):
    run = Run(tmp_path).start().steps(5)
    function, said = METRICS[change]
    run.metrics = function(run.metrics)
    assert any(said in problem for problem in problems_of(run))


def test_half_a_row_of_metrics_is_named(tmp_path):
    run = Run(tmp_path).start().steps(5)
    path = run.write_metrics() / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert audit(tmp_path).problems == ["metrics row 2 is damaged", "metrics end at step 2, the ledger at 5"]


def test_rows_of_metrics_that_are_not_due_yet(tmp_path):
    """A step stands in the ledger first; and a start may change how far apart rows are."""
    run = Run(tmp_path).start().steps(4)
    row = run.metrics.pop()
    assert problems_of(run) == []  # killed between step 4 and its row
    run._ledger.write("save", step=4, seconds=0.1)
    assert problems_of(run) == ["metrics end at step 2, the ledger at 4"]
    run.PLAN, kept = {**Run.PLAN, "log_every": 9}, [*run.metrics, row]
    run.start().steps(4).metrics = kept
    assert problems_of(run) == []


def test_metrics_after_a_restart_that_were_not_cut(tmp_path):
    run = Run(tmp_path).start().steps(2)
    saved = run.now
    run.steps(2)
    left = list(run.metrics)
    run.start(saved).steps(2)
    run.metrics = left + run.metrics[1:]
    assert problems_of(run) == ["metrics: a row covers steps 3 to 4, the one before ended at step 4"]


def test_a_damaged_checkpoint(tmp_path):
    checkpoints = [("step-00000004", "state.json is missing"), ("step-00000002", None)]
    found = audit(restarted(tmp_path).write_metrics(), checkpoints)
    assert found.problems == ["checkpoint step-00000004: state.json is missing"]
    assert found.lines[-1] == "checkpoints: 1 whole, their hashes reread"


@pytest.mark.parametrize("step", [2, 4, 9])
def test_a_checkpoint_of_other_blocks(tmp_path, step):
    problems = problems_of(restarted(tmp_path), [], {step: "of another run"})
    assert problems == [f"the checkpoint of step {step} learned from other blocks than the ledger has"]


def test_a_ledger_cut_at_a_row_does_not_reach_its_checkpoint(tmp_path):
    run = Run(tmp_path).start().steps(3)
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(lines[:-1]))
    problems = problems_of(run, [], {3: run.now.consumed})
    assert problems == ["the checkpoint of step 3 learned from other blocks than the ledger has"]


def test_mutant_cursor_not_restored(tmp_path):
    """The step comes back, the position of the data does not: it begins anew."""
    run = Run(tmp_path).start().steps(2)
    run.start(Moment(2, 0, run.now.consumed)).steps(2)
    assert "a start at step 2 goes on from what this run never was" in problems_of(run)


@pytest.mark.parametrize(("unit", "right"), [(1, False), (2, True)])
def test_mutant_skip_first_batches(tmp_path, unit, right):
    """accelerate's documented idiom over micro-batches of two. It skips batches of the loader, not optimizer steps: with
    accumulation, the step that a checkpoint remembers skips half of what was read, and the run says nothing."""
    order = blocks_at(0, 40, Run.PLAN["num_blocks"], Run.PLAN["seed"])
    run = Run(tmp_path).start().steps(2)
    batches = iter(skip_first_batches(DataLoader(order, batch_size=2), unit * run.now.step))
    run.start().steps(2, lambda now: np.concatenate([next(batches), next(batches)]))
    named = [f"step {step}: the blocks that were read are not those of the plan" for step in (3, 4)]
    assert problems_of(run) == ([] if right else named)


@pytest.mark.parametrize("event", ["_start", "_rewind"])
def test_mutant_what_was_taken_back_is_kept(tmp_path, monkeypatch, event):
    """A reader that takes no notice of starts or rewinds sees steps twice, and data left out."""
    run = restarted(tmp_path)
    run.rewind(run.now).steps(1)
    assert problems_of(run) == []
    first = iter([histories._start])
    ignored = lambda found, row: next(first, lambda *_: None)(found, row) if event == "_start" else None  # noqa: E731
    monkeypatch.setattr(histories, event, ignored)
    assert any("follows upon" in problem or "reads from" in problem for problem in problems_of(run))
