"""Packed documents on several processes: padding and documents' ends are counted over the whole step, not by rank.

Blocks have different numbers of scored tokens (best fit, isolated documents), so a mean by rank or by micro-batch is
another loss. The evaluation blocks are no multiple of the processes.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_recipe, read_rows
from safetensors.numpy import load_file

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(launch_warm, tmp_path_factory):
    """run(world, mutant) -> rows of metrics and weights; each is launched once."""
    folder = tmp_path_factory.mktemp("packed")
    recipe = prepare_recipe(
        folder,
        150,
        data={"packing": "best_fit", "block_size": 48},
        optim={"lr": 3e-3, "eps": 1e-6},  # why: test_world_size.py
        train={"max_steps": 6, "global_batch_size": 12, "log_every": 1, "isolate_documents": True},
        evaluate={"micro_batch_size": 2},
    )
    splits = json.loads((folder / "prepared" / "manifest.json").read_text())["splits"]
    assert splits["train"]["padding"] > 0 and splits["eval"]["blocks"] % 6

    @functools.cache
    def launched(world, mutant=None):
        where = folder / f"run-{world}-{mutant}"
        env = {"CLM_DIST_RECORD": str(folder / f"record-{world}-{mutant}")}
        env |= {"CLM_DIST_MUTANT": mutant} if mutant else {}
        script = Path(__file__).parent / "recorded.py"
        done = launch_warm(world, "train", recipe, f"run_dir={where}", script=script, env=env)
        assert done.code == 0, done.err
        rows = read_rows(where / "metrics.jsonl")
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        evaluations = [(row["eval/nll"], row["eval/tokens"]) for row in rows if "eval/nll" in row]
        return np.array(losses), evaluations, load_file(where / "model" / "model.safetensors")

    return launched


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_nothing_depends_on_the_processes(run, world):
    losses, evaluations, weights = run(1)
    cut = run(world)
    np.testing.assert_allclose(cut[0], losses, rtol=1e-5)
    assert cut[1][0] == pytest.approx(evaluations[0], rel=1e-9)
    for name, expected in weights.items():
        assert np.linalg.norm(cut[2][name] - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.slow
def test_mutant_tokens_counted_by_rank(run):
    """Each rank divides by the tokens of its own blocks, as if all had as many: DDP's mean of means."""
    losses, _, weights = run(1)
    mutant = run(2, "tokens_by_rank")
    assert max(abs(mutant[0] / losses - 1)) > 1e-4
    far = [np.linalg.norm(mutant[2][name] - value) / np.linalg.norm(value) for name, value in weights.items()]
    assert max(far) > 1e-3
