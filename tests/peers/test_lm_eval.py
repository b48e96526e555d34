"""An independent opinion on perplexity: EleutherAI's lm-evaluation-harness scores the same tokens with the same model.

Its rolling log-likelihood puts end-of-text before a document and scores every token of it. A block of ours that is
end-of-text and then a document's ids says just that to our evaluation, which scores all tokens of a block but the first.
So the two sums of nll have to be one number. The end of this file is the program that runs both, offline, in a process of
its own.

Legend: T block_size.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from conftest import ROOT, launch, write_blocks

from clm_dist.data.blocks import Blocks
from clm_dist.data.tokenize import ids_dtype, load_tokenizer
from clm_dist.model.build import load_model
from clm_dist.model.objective import find_objective
from clm_dist.training.batches import Batches
from clm_dist.training.evaluate import evaluate

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

T = 16
TOLERANCE = 1e-6  # relative, of summed nll


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """(figures by the program, the documents that were scored)"""
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = load_tokenizer(str(trained / "run" / "model"))
    texts = documents(trained / "texts.jsonl", tokenizer)
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = np.array([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    assert ids.shape == (len(texts), T - 1) and len(texts) > 100
    first = np.full((len(texts), 1), tokenizer.eos_token_id)
    for name, column in {"after_end_of_text": first, "after_another_token": first + 1}.items():
        write_blocks(folder / name, np.hstack([column, ids]).astype(ids_dtype(len(tokenizer))), "eval")
    (folder / "task").mkdir()
    (folder / "task" / "documents.yaml").write_text(yaml.safe_dump(task(folder)))
    # HF_HOME: what `datasets` caches goes away with the folder; `launch` itself sets HF_HUB_OFFLINE
    env = {"PYTHONPATH": str(ROOT / "tests"), "HF_HOME": str(folder / "home")}
    done = launch(1, trained / "run" / "model", folder, script=Path(__file__), env=env)
    assert done.code == 0, done.err
    return json.loads((folder / "figures.json").read_text()), texts


def documents(path, tokenizer):
    """The first T - 1 tokens of every text, as text, where that text has just these tokens again."""
    heads = [tokenizer(json.loads(line)["text"])["input_ids"][: T - 1] for line in path.read_text().splitlines()]
    texts = [(tokenizer.decode(ids), ids) for ids in heads if len(ids) == T - 1]
    return [text for text, ids in texts if tokenizer(text)["input_ids"] == ids]


def task(folder):
    """A task of the harness over a local file: perplexity of whole documents."""
    return {
        "task": "documents",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }


def test_the_harness_finds_the_same_nll(measured):
    figures, texts = measured
    nll = figures["after_end_of_text"]["nll"]
    # its three figures, turned back into the sum of nats that each was made from
    size = sum(len(text.encode()) for text in texts)
    words = sum(len(re.split(r"\s+", text)) for text in texts)  # as it counts: a space at the end begins an empty word
    theirs = {
        "bits_per_byte": figures["harness"]["bits_per_byte"] * math.log(2) * size,
        "byte_perplexity": math.log(figures["harness"]["byte_perplexity"]) * size,
        "word_perplexity": math.log(figures["harness"]["word_perplexity"]) * words,
    }
    print("ours:", nll, "relative differences:", {name: value / nll - 1 for name, value in theirs.items()})
    for name, value in theirs.items():
        assert nll == pytest.approx(value, rel=TOLERANCE), name
    assert figures["after_end_of_text"]["tokens"] == len(texts) * (T - 1)
    # it has learnt something: a uniform guess among 300 tokens is worth ln(300) = 5.7 nats
    assert 1 < nll / figures["after_end_of_text"]["tokens"] < 5


def test_every_document_has_the_same_nll(measured):
    figures, texts = measured
    ours, theirs = figures["each_of_ours"], figures["each_of_theirs"]
    assert len(ours) == len(theirs) == len(texts)
    print("largest relative difference:", max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_another_first_token_is_noticed(measured):
    """The agreement means something: with other context for the first tokens alone it is gone."""
    figures, _ = measured
    right, wrong = figures["after_end_of_text"]["nll"], figures["after_another_token"]["nll"]
    print("relative difference:", wrong / right - 1)
    assert abs(wrong / right - 1) > 100 * TOLERANCE


# ---- The program


def score(model_folder, folder):
    """The same documents by the harness and by our own evaluation."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings = {"pretrained": model_folder, "dtype": "float32"}
    manager = TaskManager(include_path=str(folder / "task"), include_defaults=False)
    found = simple_evaluate(
        "hf", settings, tasks=["documents"], task_manager=manager, device="cpu", batch_size=4, bootstrap_iters=0
    )
    samples = sorted(found["samples"]["documents"], key=lambda sample: sample["doc_id"])
    results = found["results"]["documents"]
    figures = {
        "harness": {name.removesuffix(",none"): value for name, value in results.items() if name.endswith(",none")},
        "each_of_theirs": [-sample["filtered_resps"][0] for sample in samples],
    }
    accelerator, model = Accelerator(cpu=True), load_model(model_folder)
    objective = find_objective(model)
    for name in ("after_end_of_text", "after_another_token"):
        batches = Batches(Blocks(folder / name), False, accelerator.device)
        result = evaluate(accelerator, model, objective, batches, 4, tokens_per_byte=1.0)
        figures[name] = {"nll": result.nll, "tokens": result.tokens}
    blocks = Blocks(folder / "after_end_of_text")
    ones = [Batches(One(blocks, i), False, accelerator.device) for i in range(len(blocks))]
    each = [evaluate(accelerator, model, objective, one, 1, tokens_per_byte=1.0) for one in ones]
    figures["each_of_ours"] = [result.nll for result in each]
    (folder / "figures.json").write_text(json.dumps(figures))


class One:
    """Block `number` as a set of its own."""

    def __init__(self, blocks, number):
        self.blocks, self.number = blocks, number
        self.block_size, self.num_padding = blocks.block_size, 0

    def __len__(self):
        return 1

    def __getitem__(self, indices):
        return self.blocks[[self.number for _ in indices]]


if __name__ == "__main__":
    score(sys.argv[1], Path(sys.argv[2]))
