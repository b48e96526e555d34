"""The promise: shards change nothing. DDP, the stages of ZeRO, with and without offload, and FSDP2 against one process.

Each engine is launched as users launch it, by its file of accelerate_configs/, and trains the same tiny model on the same
blocks, with 2 or 3 micro-steps a step, each step clipped. The 5 evaluation batches are no multiple of 2 or 3 processes, so
that under ZeRO-3 and FSDP2 a rank runs a spare pass. eps is large: with a small one Adam divides a wrong scale of the
gradients out again, and neither clipping nor the size of a step would show in the losses.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_recipe, read_rows

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

SHORT, MEDIUM, LONG = 8, 20, 50  # steps
MAX_NORM = 0.5
CASES = [
    ("ddp", 2, MEDIUM),
    ("zero2", 2, MEDIUM),
    ("zero3", 2, MEDIUM),
    ("fsdp2", 2, MEDIUM),
]
SOAK = [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero2_offload", 2), ("zero3_offload", 2), ("fsdp2", 2)]
SOAK += [("zero2", 3), ("zero3", 3), ("fsdp2", 3)]


class Run:
    """What a launched run left behind."""

    def __init__(self, folder):
        rows = read_rows(folder / "metrics.jsonl")
        steps = [row for row in rows if "train/loss" in row]
        self.losses = np.array([row["train/loss"] for row in steps])
        self.norms = np.array([row["train/grad_norm"] for row in steps])
        self.rates = [row["train/lr"] for row in steps]
        self.evaluations = [row["eval/nll"] for row in rows if "eval/nll" in row]
        self.samples = [
            row for row in read_rows(folder / "samples.jsonl") if row["step"] == 0
        ]  # later ones may round apart
        self.consumed = [row["consumed"] for row in read_rows(folder / "ledger.jsonl") if row["event"] == "step"]


@pytest.fixture(scope="module")
def run(launch_warm, tmp_path_factory):
    """run(config, processes, steps, mutant) -> Run; each is launched once. One process under ddp is the reference."""
    folder = tmp_path_factory.mktemp("zero")
    recipe = prepare_recipe(
        folder,
        110,
        data={"eval_fraction": 0.05},
        optim={"lr": 3e-3, "eps": 1e-4, "max_grad_norm": MAX_NORM, "schedule": "cosine", "warmup_steps": 3},
        train={"global_batch_size": 12, "micro_batch_size": 2, "log_every": 1},
        generate={"prompts": ["the cat", "a small dog"], "max_new_tokens": 6},
    )
    blocks = json.loads((folder / "prepared" / "manifest.json").read_text())["splits"]["eval"]["blocks"]

    @functools.cache
    def launched(config, processes, steps, mutant=None):
        where = folder / f"{config}-{processes}-{steps}-{mutant}"
        settings = [f"run_dir={where}", f"train.max_steps={steps}", f"evaluate.every_steps={-(-steps // 2)}"]
        settings += [f"evaluate.micro_batch_size={-(-blocks // 5)}"]
        env = {"CLM_DIST_RECORD": str(where.with_suffix(".record"))}
        env |= {"CLM_DIST_MUTANT": mutant} if mutant else {}
        script = Path(__file__).parent / "recorded.py" if mutant else None
        done = launch_warm(processes, "train", recipe, *settings, script=script, env=env, config=config)
        assert done.code == 0, done.err
        assert f"{processes} processes x 2 sequences x {6 // processes} accumulation" in done.out
        return Run(where)

    return launched


def assert_same(found, reference, steps):
    """Blocks and rates exactly, losses to 1e-4 nats (they agree to 1e-5), evaluations to a millionth."""
    assert len(found.losses) == steps and len(reference.evaluations) == 3
    assert (reference.norms > MAX_NORM).all()  # every step clips
    assert found.consumed == reference.consumed
    assert found.samples == reference.samples and len(found.samples) == 2
    assert found.rates == reference.rates and len(set(found.rates)) > steps / 2
    np.testing.assert_allclose(found.losses, reference.losses, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.norms, reference.norms, rtol=1e-3)
    np.testing.assert_allclose(found.evaluations, reference.evaluations, rtol=1e-6)


@pytest.mark.parametrize("config", ["zero2", pytest.param("zero3", marks=pytest.mark.soak)])
def test_the_first_steps(run, config):
    assert_same(run(config, 2, SHORT), run("ddp", 1, SHORT), SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "processes", "steps"),
    [*CASES, *(pytest.param(*case, LONG, marks=pytest.mark.soak) for case in SOAK)],
)
def test_shards_change_nothing(run, record_property, config, processes, steps):
    found, reference = run(config, processes, steps), run("ddp", 1, steps)
    assert_same(found, reference, steps)
    difference = float(abs(found.losses - reference.losses).max())
    record_property("largest difference of losses", difference)
    print(f"{config} x {processes}: losses differ by {difference:.1e} at most")


@pytest.mark.slow
def test_mutant_divided_twice(run):
    """A third of the gradients: the norm that is reported says it, and what is learned."""
    mutant, reference = run("zero2", 2, SHORT, "divided_twice"), run("ddp", 1, SHORT)
    assert mutant.norms[0] == pytest.approx(reference.norms[0] / 3, rel=1e-3)
    assert abs(mutant.losses - reference.losses).max() > 1e-3


@pytest.mark.slow
def test_mutant_clipped_at_one(run):
    """The norm that is reported is right, and what is learned is not."""
    mutant, reference = run("zero2", 2, SHORT, "clipped_at_one"), run("ddp", 1, SHORT)
    assert mutant.norms[0] == pytest.approx(reference.norms[0], rel=1e-3)
    assert abs(mutant.losses - reference.losses).max() > 1e-3


@pytest.mark.slow
def test_mutant_always_a_boundary(run):
    """Stage 2 then forgets micro-steps: not the gradients of the step. (Stage 3 adds them up by another count.)"""
    with pytest.raises(AssertionError):
        assert_same(run("zero2", 2, SHORT, "always_a_boundary"), run("ddp", 1, SHORT), SHORT)
