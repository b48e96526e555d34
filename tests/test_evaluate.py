"""Exact evaluation against an independent float64 loop; the distributed side stands in distributed/."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from clm_dist.training.evaluate import Evaluation


def float64_loop(model_folder, eval_folder):
    """Perplexity as a textbook would compute it: float64 throughout, one block at a time, no code of ours."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    nll, tokens, correct = 0.0, 0, 0
    for ids in datasets.load_from_disk(str(eval_folder))["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        for t in range(len(ids) - 1):
            row = logits[t] - logits[t].max()
            nll += math.log(np.exp(row).sum()) - row[ids[t + 1]]
            correct += int(row.argmax() == ids[t + 1])
            tokens += 1
    return nll, tokens, correct


@pytest.fixture(scope="module")
def evaluated(command, trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "figures.json"
    done = command("evaluate", trained / "recipe.yaml", "--output", output)
    assert done.code == 0, done.err
    return json.loads(output.read_text()), done.out


def test_the_command_agrees_with_a_float64_loop(trained, evaluated):
    nll, tokens, correct = float64_loop(trained / "run" / "model", trained / "prepared" / "eval")
    figures, out = evaluated
    assert figures["eval/tokens"] == tokens
    assert figures["eval/nll"] == pytest.approx(nll, rel=1e-6)
    assert figures["eval/loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert figures["eval/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert figures["eval/accuracy"] == pytest.approx(correct / tokens)
    assert f"perplexity {figures['eval/perplexity']:,.2f}" in out


def test_bits_per_byte_is_of_the_original_text(trained, evaluated):
    """nats per token -> bits per token -> bits per byte, by the counts of the whole split."""
    counts = json.loads((trained / "prepared" / "manifest.json").read_text())["splits"]["eval"]
    figures, _ = evaluated
    expected = figures["eval/loss"] / math.log(2) * counts["tokens"] / counts["bytes"]
    assert figures["eval/bits_per_byte"] == pytest.approx(expected)


def test_the_command_agrees_with_training(trained, evaluated):
    last = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    figures, _ = evaluated
    assert last["eval/nll"] == pytest.approx(figures["eval/nll"], rel=1e-9)


def test_the_library_saved_time_and_versions(evaluated):
    figures, _ = evaluated
    assert "_timestamp" in figures and "_evaluate_version" in figures


def test_the_figures_by_hand():
    measured = Evaluation(nll=math.log(2) * 30, tokens=10, correct=4, tokens_per_byte=0.25)
    assert measured.loss == pytest.approx(3 * math.log(2))
    assert measured.perplexity == pytest.approx(8.0)
    assert measured.bits_per_byte == pytest.approx(0.75)
    assert measured.accuracy == 0.4


def test_a_hopeless_model_has_a_number_too():
    assert Evaluation(nll=1e6, tokens=1, correct=0, tokens_per_byte=1.0).perplexity == math.exp(700)


def test_bad_input(command, trained, tmp_path):
    recipe = trained / "recipe.yaml"
    done = command("evaluate", recipe, f"run_dir={tmp_path / 'none'}")
    assert done.code == 2 and "train first, or name a model" in done.err

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((trained / "run" / "model" / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "empty" / name).write_text((trained / "run" / "model" / name).read_text())
    done = command("evaluate", recipe, "--model", tmp_path / "empty")
    assert done.code == 2 and "holds no weights (*.safetensors)" in done.err and "Traceback" not in done.err

    changed = json.loads((tmp_path / "empty" / "tokenizer.json").read_text())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    (tmp_path / "empty" / "tokenizer.json").write_text(json.dumps(changed))
    done = command("evaluate", recipe, "--model", tmp_path / "empty")
    assert done.code == 2 and "has another tokenizer" in done.err, done.err
