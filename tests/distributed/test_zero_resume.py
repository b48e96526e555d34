"""The promise: shards that were saved are gone on with, by as many ranks to the last bit, by more, fewer, or another engine.

Every run has 12 steps and is saved every 4. A copy whose later checkpoints are taken away goes on from an earlier one.
"""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, prepare_recipe, read_rows

from clm_dist.checkpoint import content
from clm_dist.checkpoint.folder import Checkpoint
from clm_dist.checkpoint.saved import Saved

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "held.py"
STEPS, EVERY = 12, 4
DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}  # masks go by micro-batches of one size


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe with accumulation, dropout, clipping and saves; its data."""
    folder = tmp_path_factory.mktemp("resume")
    return prepare_recipe(
        folder,
        110,
        data={"eval_fraction": 0.05},
        model={**TINY_MODEL, "config": {**TINY_MODEL["config"], **DROPOUT}},
        optim={"lr": 3e-3, "eps": 1e-4, "max_grad_norm": 0.5, "schedule": "cosine", "warmup_steps": 3},
        train={"max_steps": STEPS, "global_batch_size": 12, "micro_batch_size": 2, "log_every": 1},
        checkpoint={"save_every": EVERY, "keep_last": 9},
        evaluate={"every_steps": 6},
    )


@pytest.fixture(scope="module")
def reference(go_on, recipe):
    """reference(config, precision) -> the folder of a run by two processes that nothing interrupted; one each."""

    @functools.cache
    def launched(config, precision="no"):
        run = recipe.parent / f"{config}-{precision}"
        go_on(recipe, run, config, 2, precision)
        return run

    return launched


@pytest.fixture(scope="module")
def go_on(launch_warm):
    """go_on(recipe, run, config, processes, precision, every) -> what the ranks held once they had loaded, if they did:
    (model, optimizer) or None."""

    def gone_on(recipe, run, config, processes, precision="no", every=EVERY):
        held = run.with_name(f"{run.name}-{config}-{processes}.held")
        env = {"CLM_DIST_HELD": str(held)}
        settings = [f"run_dir={run}", f"train.mixed_precision={precision}", f"checkpoint.save_every={every}"]
        done = launch_warm(processes, "train", recipe, *settings, script=SCRIPT, env=env, config=config)
        assert done.code == 0, done.err
        found = [sorted(held.glob(f"{kind}-*.safetensors")) for kind in ("model", "optimizer")]
        return [Saved(paths) for paths in found] if all(found) else None

    return gone_on


def cut(run, step):
    """Takes away all that came after a step."""
    for path in (run / "checkpoints").glob("step-*"):
        if Checkpoint(path).step > step:
            shutil.rmtree(path)


def saved(run, step):
    """The model and the optimizer of a checkpoint."""
    return [content.read(Checkpoint(run / "checkpoints" / f"step-{step:08d}"), kind) for kind in ("model", "optimizer")]


def differences(found, expected):
    """Of each tensor, the largest difference over the largest value there is: 0 where all bits are the same."""
    apart = {}
    for one, other in zip(found, expected, strict=True):
        assert one.names() == other.names()
        for name in sorted(other.names()):
            a, b = (saved.read(name, 0, other.numel(name)) for saved in (one, other))
            assert one.numel(name) == other.numel(name) and a.dtype == b.dtype
            if a.numpy().tobytes() != b.numpy().tobytes():
                apart[name] = ((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny)).item()
    return apart


def consumed(run):
    return [row["consumed"] for row in read_rows(run / "ledger.jsonl") if row["event"] == "step"][-1]


CASES = [("zero3", "no"), ("fsdp2", "no"), ("zero2", "bf16")]
CASES += [
    pytest.param(*case, marks=pytest.mark.soak)
    for case in [("zero1", "no"), ("zero2", "no"), ("zero2_offload", "no"), ("zero3", "bf16")]
]


@pytest.mark.parametrize(("config", "precision"), CASES)
def test_going_on_is_equal_to_the_last_bit(go_on, recipe, reference, tmp_path, config, precision):
    """Weights, moments and counts of the last step; what was loaded is what was saved; the exported model too."""
    whole, run = reference(config, precision), tmp_path / "run"
    shutil.copytree(whole, run)
    cut(run, EVERY)
    assert differences(go_on(recipe, run, config, 2, precision), saved(whole, EVERY)) == {}
    assert differences(saved(run, STEPS), saved(whole, STEPS)) == {}
    weights = [(one / "model" / "model.safetensors").read_bytes() for one in (run, whole)]
    assert weights[0] == weights[1] and consumed(run) == consumed(whole)


@pytest.mark.parametrize("config", ["zero3", pytest.param("zero2", marks=pytest.mark.soak)])
def test_two_ranks_then_one_then_three(command, go_on, recipe, reference, tmp_path, config):
    """Loaded by one rank, then by three: moments and weights are those that were saved, to the last bit. Where the run then
    ends, the moments are those of a run that was never resharded to 1e-6, absolutely; relative to the largest of each
    tensor to 1e-4, for ranks add gradients up in another order, by which weights move in their last digits, and later
    gradients with them."""
    whole, run = reference(config), tmp_path / "run"
    shutil.copytree(whole, run)
    for step, processes in ((EVERY, 1), (2 * EVERY, 3)):
        cut(run, step)
        before = saved(run, step)
        assert differences(go_on(recipe, run, config, processes), before) == {}
    worlds = [row["world_size"] for row in read_rows(run / "ledger.jsonl") if row["event"] == "start"]
    assert worlds == [2, 1, 3] and consumed(run) == consumed(whole)
    found, expected = saved(run, STEPS), saved(whole, STEPS)
    apart = differences(found, expected)
    print(f"{config}: {max(apart.values()):.1e} of a tensor's largest value at most")
    assert max(apart.values()) < 1e-4
    for name in (name for name in expected[1].names() if name.startswith("exp_avg")):
        a, b = (one[1].read(name, 0, expected[1].numel(name)) for one in (found, expected))
        assert (a - b).abs().max() <= 1e-6, name
    assert command("verify", run).code == 0


ENGINES = [("ddp", 2), ("zero3", 2), ("fsdp2", 2), ("zero2", 2), ("ddp", 1)]


@pytest.mark.parametrize("engines", [ENGINES[:3], pytest.param(ENGINES, marks=pytest.mark.soak)], ids=["three", "five"])
def test_one_run_by_several_engines(command, go_on, recipe, reference, tmp_path, engines):
    """Each takes over what the one before it saved, to the last bit; the blocks are those of any other run, and the ledger
    holds."""
    whole, run = reference("zero3"), tmp_path / "run"
    for number, (config, processes) in enumerate(engines):
        before = None
        if number:
            cut(run, 2 * number)  # each has saved two steps more than the one before it
            before = saved(run, 2 * number)
        loaded = go_on(recipe, run, config, processes, every=2)
        assert loaded is None if before is None else differences(loaded, before) == {}
    verified = command("verify", run)
    assert verified.code == 0, verified.err
    assert consumed(run) == consumed(whole)
    assert max(differences(saved(run, STEPS), saved(whole, STEPS)).values()) < 1e-4
