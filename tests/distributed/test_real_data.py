"""The real ELI5 answers, the real GPT-2 tokenizer, DistilGPT2's real shape; by the shipped recipe."""

import json

import pytest
import torch
from conftest import ROOT, launch, read_rows, run_command

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.real_data]

RECIPE = ROOT / "recipes" / "eli5_distilgpt2.yaml"
SMALL_GPT2 = "{n_layer: 4, n_embd: 128, n_head: 4, n_positions: 128}"


@pytest.fixture(scope="module")
def prepared(real_data, tmp_path_factory):
    """The recipe's data, prepared from the local file: folder and overrides to go on with."""
    folder = tmp_path_factory.mktemp("real")
    overrides = [
        f"data.source={real_data / 'eli5_category' / 'eli5-category-test.json.gz'}",
        f"data.tokenizer={real_data / 'distilgpt2'}",
        f"model.name={real_data / 'distilgpt2'}",
        "model.from_scratch=true",
        f"data.prepared_dir={folder / 'prepared'}",
    ]
    done = run_command("prepare", RECIPE, *overrides)
    assert done.code == 0, done.err
    return folder, overrides


def test_not_a_token_is_lost(prepared):
    folder, _ = prepared
    splits = json.loads((folder / "prepared" / "manifest.json").read_text())["splits"]
    assert sum(split["tokens"] for split in splits.values()) == 1_820_121
    assert sum(split["documents"] for split in splits.values()) == 5_411
    assert splits["eval"]["documents"] == 1_082  # a fifth
    for split in splits.values():
        assert split["tokens"] == split["blocks"] * 128 + split["remainder"] and split["remainder"] < 128


@pytest.mark.soak
def test_a_small_gpt2_learns_in_300_steps_on_two_processes(prepared, tmp_path):
    """On half a per cent of the documents held out: evaluating on the recipe's fifth takes longer than the training."""
    _, overrides = prepared
    values = [*overrides[:2], f"data.prepared_dir={tmp_path / 'prepared'}", "data.eval_fraction=0.005"]
    values += ["model.name=null", "model.type=gpt2", f"model.config={SMALL_GPT2}"]
    assert run_command("prepare", RECIPE, *values).code == 0
    values += [
        "optim.lr=3e-3",
        "optim.warmup_steps=20",
        "train.epochs=null",
        "train.max_steps=300",
        "train.global_batch_size=4",
    ]
    values += ["evaluate.every_steps=100", "generate.max_new_tokens=20", f"run_dir={tmp_path / 'run'}"]
    done = launch(2, "train", RECIPE, *values)
    assert done.code == 0, done.err
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    evaluations = [row["eval/perplexity"] for row in rows if "eval/loss" in row]
    assert losses[0] > 8 and losses[-1] < 7  # ln(50,257) = 10.8 at the start
    assert evaluations[0] > 45_000 and evaluations[-1] < 1_000
    assert evaluations == sorted(evaluations, reverse=True)
    report = run_command("report", tmp_path / "run")
    assert report.code == 0 and (tmp_path / "run" / "report.html").read_text().count("<svg") == 4


@pytest.mark.soak
def test_distilgpt2_itself_takes_a_few_steps(prepared, tmp_path):
    """82 million parameters; evaluation off, because it would take longer than the steps. In bf16 where the CPU has it: on
    one without AVX-512 a step takes minutes (46 s for the head's forward product alone, 0.9 s in fp32)."""
    precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"
    _, overrides = prepared
    values = [override for override in overrides if not override.startswith("data.prepared_dir")]
    values += [f"data.prepared_dir={tmp_path / 'prepared'}", "data.eval_fraction=0.0", "generate.prompts=[]"]
    assert run_command("prepare", RECIPE, *values).code == 0
    done = launch(
        2, "train", RECIPE, *values, f"run_dir={tmp_path / 'run'}", f"train.mixed_precision={precision}", "optim.lr=1e-3",
        "optim.warmup_steps=1", "train.epochs=null", "train.max_steps=6", "train.global_batch_size=2", "train.log_every=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "GPT2LMHeadModel, 81,912,576 parameters" in done.out
    losses = [row["train/loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > losses[-1] + 1


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_the_shipped_recipe_keeps_its_promises(launch_warm, prepared, engine):
    """`check`, with one layer and two sequences a step for the sake of time: DistilGPT2's own embeddings and widths."""
    pytest.importorskip("deepspeed")
    _, overrides = prepared
    smaller = ["model.config.n_layer=1", "train.global_batch_size=2"]
    done = launch_warm(2, "check", RECIPE, *overrides, *smaller, config=engine)
    assert done.code == 0 and "all promises kept" in done.out, done.out + done.err
