"""The promise: a loss by chunks, and GELU as one operation, learn what whole logits and the library's own operations learn.

200 steps of two processes, in fp32.
An evaluation of the same weights has the same sums, and a gradient of which a chunk is missing is noticed.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_recipe, read_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 200
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"max_position_embeddings": 64, "tie_word_embeddings": False}
MODELS = {"gpt2": [], "llama": ["model.type=llama", f"model.config={json.dumps(LLAMA)}"]}
WHOLE = "train.chunked_loss=false"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The 12 sequences of a rank, 16 tokens long, are with a vocabulary of 300 about seven chunks of chunked.py."""
    folder = tmp_path_factory.mktemp("chunked")
    prepare_recipe(folder, 110, train={"max_steps": STEPS, "global_batch_size": 24, "log_every": 1}, optim={"lr": 3e-3})
    return folder


@pytest.fixture(scope="module")
def program(launch_warm, folder):
    """program(subcommand, recipe, override, ...) of two processes, by small chunks."""

    def launched(*arguments, **env):
        done = launch_warm(2, *arguments, script=Path(__file__).parent / "chunked.py", env=env, cwd=folder)
        assert done.code == 0, done.err
        return done

    return launched


def losses(program, folder, name, *overrides, **env):
    """Of every step, (200,)."""
    done = program("train", folder / "recipe.yaml", f"run_dir={folder / name}", *overrides, **env)
    counts = re.findall(r"by chunks: (\d+) times", done.out)
    assert len(counts) == 2 and all((count == "0") == (WHOLE in overrides) for count in counts)
    rows = read_rows(folder / name / "metrics.jsonl")
    return np.array([row["train/loss"] for row in rows if "train/loss" in row])


@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.soak)])
def test_200_steps(program, folder, model):
    chunks = losses(program, folder, f"{model}-chunks", *MODELS[model])
    whole = losses(program, folder, f"{model}-whole", *MODELS[model], WHOLE, CLM_DIST_UNFUSED="1")
    assert len(chunks) == len(whole) == STEPS and whole[-1] < whole[0] - 2
    difference = np.abs(chunks - whole).max()
    print(f"{model}: losses differ by {difference:.1e} at most")
    assert difference < 1e-4


def test_an_evaluation(program, folder):
    """Of the same weights: the sums within 1e-9."""
    program("train", folder / "recipe.yaml", f"run_dir={folder / 'one'}", "train.max_steps=1")
    figures = []
    for name, overrides in (("chunks", []), ("whole", [WHOLE])):
        output = folder / f"{name}.json"
        where = ["--model", folder / "one" / "model", "--output", output]
        done = program("evaluate", folder / "recipe.yaml", *where, *overrides)
        assert all((count != "0") == (name == "chunks") for count in re.findall(r"by chunks: (\d+) times", done.out))
        assert "by chunks: " in done.out
        figures.append(json.loads(output.read_text()))
    assert figures[0]["eval/nll"] == pytest.approx(figures[1]["eval/nll"], rel=1e-9)
    assert figures[0]["eval/tokens"] == figures[1]["eval/tokens"] > 0


def test_mutant_last_chunk_only(program, folder):
    short = "train.max_steps=5"
    chunks = losses(program, folder, "mutant", short, CLM_DIST_MUTANT="last_chunk_only")
    whole = losses(program, folder, "short-whole", short, WHOLE)
    assert np.abs(chunks - whole).max() > 1e-3
