"""A run folder that is what it says verifies; each way not to be is named."""

import json

import numpy as np
import pytest
from accelerate import skip_first_batches
from handmade import Moment, Run, planned
from torch.utils.data import DataLoader

from clm_dist.data.order import blocks_at
from clm_dist.ledger.audit import audit
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
        "data: 5 steps in 2 starts read 20 blocks, each of 10 2 times, as planned",
        "2 steps were done again, 0 updates withheld, 0 blocks passed over in 0 rewinds",
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
    assert found.lines[2] == "2 steps were done again, 0 updates withheld, 16 blocks passed over in 2 rewinds"


def test_withheld_updates_are_counted_and_read_all_the_same(tmp_path):
    found = audit(Run(tmp_path).start().steps(1).steps(1, update=False).write_metrics())
    assert found.problems == []
    assert found.lines[1] == "data: 2 steps in 1 starts read 8 blocks, each of 10 0 or 1 times, as planned"
    assert found.lines[2] == "0 steps were done again, 1 updates withheld, 0 blocks passed over in 0 rewinds"


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


def test_a_step_done_twice(tmp_path):
    run = Run(tmp_path).start().steps(2)
    run.row(2, 4, 8, digest_of(planned(4)))
    assert "step 2 follows upon step 2" in problems_of(run)


def test_a_step_that_reads_again_what_the_one_before_read(tmp_path):
    """Honest about it: 3 follows upon 2, but from the data of 2. Blocks seen twice, others not at all."""
    run = Run(tmp_path).start().steps(2)
    run.row(3, 4, 8, digest_of(planned(4)))
    problems = problems_of(run)
    assert "step 3 reads from position 4, step 2 ended at 8" in problems


def test_a_step_missing(tmp_path):
    run = Run(tmp_path).start().steps(2)
    run.row(4, 12, 16, digest_of(planned(12)))
    problems = problems_of(run)
    assert "step 4 follows upon step 2" in problems
    assert any("blocks were not seen as often as planned" in problem for problem in problems)


def test_a_step_of_another_size(tmp_path):
    run = Run(tmp_path).start()
    run.row(1, 0, 3, digest_of(planned(0)[:3]))
    assert "step 1 read 3 blocks, not a global batch" in problems_of(run)


def replaced(cursor):
    """The plan's blocks but for one."""
    blocks = planned(cursor).copy()
    blocks[1] = next(block for block in range(10) if block not in blocks)
    return blocks


@pytest.mark.parametrize("wrong", [replaced, lambda cursor: planned(cursor)[:3], lambda cursor: planned(cursor + 1)])
def test_a_block_replaced_left_out_or_shifted(tmp_path, wrong):
    run = Run(tmp_path).start().steps(1).steps(1, lambda now: wrong(now.cursor)).steps(1)
    assert problems_of(run) == ["step 2: the blocks that were read are not those of the plan"]


def test_a_row_taken_out_of_the_ledger(tmp_path):
    run = restarted(tmp_path)
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join([*lines[:2], *lines[3:]]))
    assert problems_of(run)[0] == "ledger row 3 (step) does not follow from the one before"


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
    assert "checkpoints: 1 whole, their hashes reread" in found.lines


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
