"""The promise: how a global batch is cut into ranks and micro-steps changes nothing.

Nine runs by the real launcher (1, 2 and 3 processes; accumulation 1, 2 and 3) train the same tiny model on the same data.
The 13 evaluation blocks make 7 batches of 2, so ranks are uneven; in another evaluation 2 batches leave one rank of three
with nothing.
"""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import launch, prepare_recipe, read_rows
from safetensors.numpy import load_file

pytestmark = pytest.mark.distributed

GLOBAL_BATCH = 36
SHAPES = {
    (world, accumulation): GLOBAL_BATCH // world // accumulation for world in (1, 2, 3) for accumulation in (1, 2, 3)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data whose blocks are no multiple of the global batch, so that steps straddle epochs."""
    folder = tmp_path_factory.mktemp("worlds")
    train = {"max_steps": 8, "global_batch_size": GLOBAL_BATCH, "log_every": 1}
    # Adam divides each gradient by its own size, down to eps. A key's bias has no true gradient (softmax does not see a
    # shift), only rounding of about 1e-10, which eps=1e-8 would blow up to a hundredth of a full step.
    optim = {"lr": 3e-3, "eps": 1e-6}
    prepare_recipe(folder, 110, train=train, evaluate={"micro_batch_size": 2, "every_steps": 4}, optim=optim)
    blocks = json.loads((folder / "prepared" / "manifest.json").read_text())["splits"]["train"]["blocks"]
    assert blocks % GLOBAL_BATCH and blocks < 8 * GLOBAL_BATCH  # steps straddle an epoch's end
    return folder


class Run:
    """What a launched run left behind."""

    def __init__(self, folder, record):
        rows = read_rows(folder / "metrics.jsonl")
        self.losses = np.array([row["train/loss"] for row in rows if "train/loss" in row])
        self.norms = np.array([row["train/grad_norm"] for row in rows if "train/loss" in row])
        self.rates = [row["train/lr"] for row in rows if "train/lr" in row]
        self.evaluations = [row["eval/nll"] for row in rows if "eval/nll" in row]
        self.weights = load_file(folder / "model" / "model.safetensors")
        ranks = sorted(record.glob("train-rank*.jsonl"))
        self.ranks = len(ranks)
        shares = [read_rows(rank) for rank in ranks]
        turns = itertools.zip_longest(*shares, fillvalue=[])  # a mutant's ranks may be uneven
        self.stream = [index for turn in turns for share in turn for index in share]


@pytest.fixture(scope="module")
def run(launch_warm, folder):
    """run(world, accumulation, mutant) -> Run; each is launched once."""
    script = Path(__file__).parent / "recorded.py"

    @functools.cache
    def launched(world, accumulation, mutant=None, micro_batch_size=None, dropout=0.0):
        micro_batch_size = micro_batch_size or SHAPES[world, accumulation]
        name = f"{world}-{accumulation}-{mutant}" + ("-dropout" if dropout else "")
        env = {"CLM_DIST_RECORD": str(folder / f"record-{name}")}
        if mutant:
            env["CLM_DIST_MUTANT"] = mutant
        overrides = [f"run_dir={folder / f'run-{name}'}", f"train.micro_batch_size={micro_batch_size}"]
        overrides += [f"model.config.{place}_pdrop={dropout}" for place in ("attn", "embd", "resid")]
        done = launch_warm(world, "train", folder / "recipe.yaml", *overrides, script=script, env=env)
        assert done.code == 0, done.err
        assert f"{world} processes x {micro_batch_size} sequences x {accumulation} accumulation" in done.out
        return Run(folder / f"run-{name}", folder / f"record-{name}")

    return launched


def assert_same_order(run, reference):
    assert run.stream == reference.stream
    assert len(run.stream) == 8 * GLOBAL_BATCH


def assert_same_losses(run, reference):
    np.testing.assert_allclose(run.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(run.norms, reference.norms, rtol=1e-4)


def assert_same_weights(run, reference):
    """Each tensor to 1e-5: norm of the difference over norm of the tensor."""
    for name, expected in reference.weights.items():
        assert np.linalg.norm(run.weights[name] - expected) <= 1e-5 * np.linalg.norm(expected), name


def assert_same_evaluation_before_training(run, reference):
    """The same (initial) weights: the sums agree far below what training would hide."""
    assert run.evaluations[0] == pytest.approx(reference.evaluations[0], rel=1e-9)


LATER = [(1, 3), (2, 3), (3, 1), (3, 3)]  # the soak suite cuts in these ways too


@pytest.mark.parametrize(
    "shape",
    [pytest.param(one, marks=pytest.mark.soak if one in LATER else ()) for one in SHAPES if one != (1, 1)],
    ids=str,
)
def test_nothing_depends_on_the_cut(run, shape):
    reference, cut = run(1, 1), run(*shape)
    assert cut.ranks == shape[0]
    assert_same_order(cut, reference)
    assert cut.rates == reference.rates
    assert_same_losses(cut, reference)
    assert_same_weights(cut, reference)
    assert_same_evaluation_before_training(cut, reference)
    np.testing.assert_allclose(cut.evaluations, reference.evaluations, rtol=1e-5)


@pytest.mark.slow
def test_dropout_is_of_the_place_in_the_batch_not_of_the_rank(run):
    """With one micro-batch size, 1 x 6 and 3 x 2 micro-steps draw the same masks."""
    alone = run(1, 6, micro_batch_size=6, dropout=0.3)
    together = run(3, 2, micro_batch_size=6, dropout=0.3)
    assert_same_losses(together, alone)
    assert_same_weights(together, alone)
    with pytest.raises(AssertionError):  # and there was dropout
        assert_same_losses(together, run(1, 1))


def test_every_block_once_an_epoch_over_all_ranks(run, folder):
    blocks = json.loads((folder / "prepared" / "manifest.json").read_text())["splits"]["train"]["blocks"]
    assert sorted(run(3, 2).stream[:blocks]) == list(range(blocks))


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_evaluation_of_the_same_weights(launch_warm, run, folder, world):
    """The command at another world size: equal to 1e-9, also when a rank has no block at all."""
    run(1, 1)
    model = folder / "run-1-1-None" / "model"
    for micro_batch_size in (2, 100):  # 100: one batch for all, the other ranks are empty
        figures = []
        for processes in (1, world):
            output = folder / f"evaluation-{processes}-{world}-{micro_batch_size}.json"
            overrides = [f"evaluate.micro_batch_size={micro_batch_size}", "--output", output]
            done = launch_warm(processes, "evaluate", folder / "recipe.yaml", "--model", model, *overrides)
            assert done.code == 0, done.err
            figures.append(json.loads(output.read_text()))
        alone, together = figures
        assert together["eval/tokens"] == alone["eval/tokens"]
        assert together["eval/nll"] == pytest.approx(alone["eval/nll"], rel=1e-9)
        assert together["eval/accuracy"] == alone["eval/accuracy"]


@pytest.mark.slow
def test_mutant_prepared_scheduler(run):
    mutant = run(2, 1, "prepared_scheduler")
    with pytest.raises(AssertionError):
        assert_same_losses(mutant, run(1, 1))
    with pytest.raises(AssertionError):
        assert_same_weights(mutant, run(1, 1))


@pytest.mark.slow
def test_mutant_repeat_evaluation(run):
    with pytest.raises(AssertionError):
        assert_same_evaluation_before_training(run(2, 1, "repeat_evaluation"), run(1, 1))


@pytest.mark.slow
def test_mutant_window_count(run):
    """Its own order, so it is compared with itself: right while windows are full, wrong from the epoch's end on."""
    whole, cut = run(1, 1, "window_count"), run(2, 3, "window_count")
    np.testing.assert_allclose(cut.losses[:2], whole.losses[:2], rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_same_losses(cut, whole)


@pytest.mark.slow
def test_mutant_per_rank_mean(run):
    with pytest.raises(AssertionError):
        assert_same_losses(run(2, 1, "per_rank_mean"), run(1, 1))


def test_a_batch_that_the_world_cannot_share_is_one_message(folder):
    done = launch(2, "train", folder / "recipe.yaml", f"run_dir={folder / 'none'}", "train.global_batch_size=35")
    assert done.code != 0
    assert len(re.findall("train.global_batch_size=35 is not divisible by 2 processes", done.err)) == 1
    assert "clm_dist/training" not in done.err  # no traceback of ours
    assert not (folder / "none").exists()
