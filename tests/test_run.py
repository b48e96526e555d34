"""A whole run in one process: what lies in its folder afterwards, and that it is what it says."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_rows, recipe_values, run_command, write_recipe

from clm_dist import recipe
from clm_dist.model.loss import next_token_nll


def test_the_run_folder(trained):
    names = {path.name for path in (trained / "run").iterdir()}
    expected = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "ledger.jsonl",
        "checkpoints",
        "outbox",
    }
    assert names == {*expected, "model", "model_best", ".lock"}
    environment = json.loads((trained / "run" / "environment.json").read_text())
    assert environment["processes"] == 1
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["command"][-2] == "train"


def test_metrics(trained):
    rows = read_rows(trained / "run" / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 31))
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == 30
    assert evaluations[-1]["eval/perplexity"] < 0.3 * evaluations[0]["eval/perplexity"]
    # linear: 1e-2 at the first update, a thirtieth of it at the last
    assert train[0]["train/lr"] == pytest.approx(1e-2) and train[-1]["train/lr"] == pytest.approx(1e-2 / 30)
    assert train[-1]["train/tokens_seen"] == 30 * 12 * 16


def test_evaluations_fall_on_the_ends_of_epochs(trained):
    blocks = json.loads((trained / "prepared" / "manifest.json").read_text())["splits"]["train"]["blocks"]
    ends = [step for step in range(1, 31) if step * 12 // blocks > (step - 1) * 12 // blocks]
    rows = [row["step"] for row in read_rows(trained / "run" / "metrics.jsonl") if "eval/loss" in row]
    assert rows == sorted({0, *ends, 30})


def test_the_record_repeats_the_run(command, trained, tmp_path):
    done = command("train", trained / "run" / "config.yaml", f"run_dir={tmp_path / 'again'}")
    assert done.code == 0, done.err
    keys = ("step", "train/loss", "eval/loss", "train/grad_norm")
    first, again = (
        [{key: row[key] for key in keys if key in row} for row in read_rows(folder / "metrics.jsonl")]
        for folder in (trained / "run", tmp_path / "again")
    )
    assert first == again  # to the last bit: same machine, same number of processes
    assert (trained / "run" / "samples.jsonl").read_text() == (tmp_path / "again" / "samples.jsonl").read_text()


def test_the_exported_folder_is_what_transformers_expects(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    for name in ("model", "model_best"):
        folder = trained / "run" / name
        files = {path.name for path in folder.iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
        assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # colleagues can read the weights too
    generate = pipeline("text-generation", model=str(trained / "run" / "model"))
    [result] = generate("the cat")
    assert result["generated_text"].startswith("the cat")
    model = AutoModelForCausalLM.from_pretrained(trained / "run" / "model")
    assert model.config.use_cache and model.generation_config.max_new_tokens == 8
    tokenizer = AutoTokenizer.from_pretrained(trained / "run" / "model")
    assert tokenizer.eos_token == "<|endoftext|>"


def test_the_card_gives_the_measured_figures(trained):
    card = (trained / "run" / "model" / "README.md").read_text()
    last = [row for row in read_rows(trained / "run" / "metrics.jsonl") if "eval/loss" in row][-1]
    assert f"| perplexity | {last['eval/perplexity']:.2f} |" in card
    assert "trained from a gpt2 with random weights" in card.replace("Trained by next-token prediction", "trained")
    assert str(trained) not in card  # a card is public, a path is not
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.library_name == "transformers"


def test_the_report_needs_no_network(command, trained, tmp_path):
    done = command("report", trained / "run", "--output", tmp_path / "report.html")
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page) and "<script" not in page
    for needle in ("the cat", "prepared_dir", "perplexity after training", torch.__version__):
        assert needle in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        curves = [path for path in re.findall(r'<path d="([^"]*)"', svg) if path.count("L") >= 3]
        assert curves, "a plot without a curve"


def test_a_report_of_nothing(command, tmp_path):
    done = command("report", tmp_path)
    assert done.code == 2 and "lacks config.yaml; give the folder of a run" in done.err


def test_another_run_is_never_overwritten_unasked(command, trained, tmp_path):
    before = {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()}
    again = command("train", trained / "recipe.yaml")
    assert again.code == 0 and "run is finished; --overwrite trains it again" in again.out
    never = command("train", trained / "recipe.yaml", "train.resume=never")
    assert never.code == 2
    assert "holds another run" in never.err and "set another run_dir to keep both, or add --overwrite" in never.err
    other = command("train", trained / "recipe.yaml", "optim.lr=0.5", "seed=7")
    assert other.code == 2 and "optim.lr: 0.01 -> 0.5, seed: 42 -> 7; set another run_dir to keep both" in other.err
    assert {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_overwrite_replaces_a_run_but_not_what_is_not_of_it(command, trained, tmp_path):
    short = (trained / "recipe.yaml", f"run_dir={tmp_path / 'run'}", "train.max_steps=2")
    assert command("train", *short).code == 0
    assert command("train", *short, "--overwrite", "train.max_steps=1").code == 0
    assert max(row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")) == 1
    (tmp_path / "run" / ".model.partial").mkdir()  # of an export that was killed
    assert command("train", *short, "--overwrite").code == 0
    assert not (tmp_path / "run" / ".model.partial").exists()
    done = command("train", *short, "--overwrite", "model.type=null", f"model.name={tmp_path / 'run' / 'model'}")
    assert done.code == 2 and "--overwrite would delete" in done.err
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = command("train", *short, "--overwrite")
    assert done.code == 2 and "holds notes.txt, which is not of a run" in done.err
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("overrides", "needle"),
    [
        (["data.prepared_dir=nowhere"], "holds no prepared data; run `clm-dist prepare RECIPE` first"),
        (["train.global_batch_size=100000"], "training blocks are fewer than one step's"),
        (["model.config.n_positions=8", "generate.prompts=[]"], "data.block_size=16 exceeds the 8 positions of gpt2"),
        (["model.config.vocab_size=100"], "the tokenizer has 300 tokens, the embedding of gpt2 only 100"),
        (["model.config.n_heads=2"], "unknown key model.config.n_heads; did you mean n_head?"),
        (["generate.max_new_tokens=64"], "exceed the model's 64 positions"),
        (["train.mixed_precision=fp16"], "fp16 needs a GPU"),
        (["model.config.n_embd=33"], "builds no gpt2: `embed_dim` must be divisible by num_heads"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(command, trained, tmp_path, overrides, needle):
    done = command("train", trained / "recipe.yaml", f"run_dir={tmp_path / 'run'}", *overrides)
    assert done.code == 2 and needle in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "run").exists()


def test_interrupting_keeps_what_was_written(trained, tmp_path):
    command = [sys.executable, "-m", "clm_dist", "train", str(trained / "recipe.yaml"), "train.max_steps=100000"]
    process = subprocess.Popen(
        [*command, f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 300
    while time.time() < deadline and (not metrics.exists() or metrics.read_text().count("train/loss") < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "clm-dist train: stopped by SIGINT; saved at step" in err
    assert len([row for row in read_rows(metrics) if "train/loss" in row]) >= 3


@pytest.mark.parametrize("command", ["evaluate", "generate", "report"])
def test_interrupting_the_other_commands(trained, tmp_path, command):
    """Ctrl-C while the command starts up or works: one line, 130, nothing half-written."""
    target = {"evaluate": "recipe.yaml", "generate": "run/model", "report": "run"}[command]
    extra = ["--prompt", "x"] if command == "generate" else []
    output = tmp_path / {"evaluate": "o.json", "generate": "o.jsonl", "report": "o.html"}[command]
    arguments = [sys.executable, "-m", "clm_dist", command, str(trained / target), *extra, "--output", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for delay in (0.4, 0.8, 1.6, 3.2, 6.4, 0.2):  # how soon Python is up, and how long it works, depends on the machine
        output.unlink(missing_ok=True)
        process = subprocess.Popen(
            arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        if process.returncode == 130:
            break
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert not output.exists()


def test_bf16_trains_and_keeps_single_precision_weights(command, trained, tmp_path):
    done = command(
        "train",
        trained / "recipe.yaml",
        f"run_dir={tmp_path / 'run'}",
        "train.mixed_precision=bf16",
        "train.max_steps=20",
    )
    assert done.code == 0, done.err
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "run" / "model" / "model.safetensors").values()} == {torch.float32}
    evaluations = [row["eval/loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row]
    assert evaluations[-1] < evaluations[0] - 0.5


def test_a_model_by_folder_goes_on_from_its_weights(command, trained, tmp_path):
    values = recipe_values(trained)
    values["run_dir"] = str(tmp_path / "run")
    values["model"] = {"name": str(trained / "run" / "model")}
    values["train"] = {"max_steps": 1, "global_batch_size": 12}
    assert command("train", write_recipe(tmp_path / "r.yaml", values)).code == 0
    first = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    last = [row for row in read_rows(trained / "run" / "metrics.jsonl") if "eval/loss" in row][-1]
    assert first["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-9)


def test_one_step_by_hand(trained, monkeypatch):
    """The first update and its metrics, recomputed with plain torch and the model as transformers has it."""
    from clm_dist.data.blocks import Blocks
    from clm_dist.data.order import global_batch
    from clm_dist.data.tokenize import load_tokenizer, token_ids
    from clm_dist.model import build
    from clm_dist.model.configuration import model_configuration

    monkeypatch.setattr(build, "fuse_gelu", lambda model: None)
    config = recipe.load(trained / "recipe.yaml", [])
    blocks = Blocks(trained / "prepared" / "train")
    ids = token_ids(load_tokenizer(str(trained / "prepared" / "tokenizer")))
    model = build.build_model(config.model, model_configuration(config.model, ids), config.seed).train()
    batch = torch.from_numpy(blocks[global_batch(0, 12, len(blocks), config.seed)].astype("int64"))
    loss = next_token_nll(model(input_ids=batch).logits, batch).mean()
    loss.backward()
    norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in model.parameters()))
    row = next(row for row in read_rows(trained / "run" / "metrics.jsonl") if "train/loss" in row)
    assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.slow
def test_evaluating_and_exporting_leave_training_alone(command, trained, tmp_path):
    """In bf16 with dropout: looking at every step, or only at the end, the losses are the same to the last bit.

    Unwrapping a model for export can take its mixed precision away for good; sampling can move the generator.
    """
    losses = []
    for every in (1, 1000):
        folder = tmp_path / str(every)
        overrides = [
            f"run_dir={folder}",
            "train.mixed_precision=bf16",
            "train.max_steps=8",
            f"evaluate.every_steps={every}",
        ]
        overrides += ["model.config.resid_pdrop=0.2", "train.log_every=1"]
        done = command("train", trained / "recipe.yaml", *overrides)
        assert done.code == 0, done.err
        losses.append([row["train/loss"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_two_runs_started_into_one_folder(trained, tmp_path, monkeypatch):
    """Both find it free; the second waits for the first to leave, and leaves its files alone if it does not."""
    from clm_dist.errors import UserError
    from clm_dist.training import run_folder

    monkeypatch.setattr(run_folder, "PATIENCE", 0.5)
    first = run_folder.claim(str(tmp_path / "run"))
    with pytest.raises(
        UserError, match=r"is being written by process .*; wait for it, stop it, or set another run_dir"
    ):
        run_folder.claim(str(tmp_path / "run"))
    first.close()
    run_folder.claim(str(tmp_path / "run")).close()


def test_a_dry_run_checks_and_starts_nothing(trained, tmp_path):
    arguments = ("train", trained / "recipe.yaml", "--dry-run", f"run_dir={tmp_path / 'run'}")
    done = run_command(*arguments, env={"WORLD_SIZE": "3"})
    assert done.code == 0 and "3 processes x 4 sequences x 1 accumulation x 16 tokens = 192 tokens" in done.out
    done = run_command(*arguments, env={"WORLD_SIZE": "5"})
    assert done.code == 2 and "not divisible by 5 processes" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "output", "needle"),
    [
        ("evaluate", "there.json", "there.json exists; choose another name"),
        ("evaluate", "figures.txt", "does not end in .json"),
        ("report", "there.json", "there.json exists"),
        ("report", "no/folder.html", "there is no folder"),
    ],
)
def test_outputs_that_would_overwrite_or_fail_are_refused_first(trained, tmp_path, command, output, needle):
    (tmp_path / "there.json").write_text("mine")
    target = trained / "recipe.yaml" if command == "evaluate" else trained / "run"
    done = run_command(command, target, "--output", tmp_path / output)
    assert done.code == 2 and needle in done.err and "Traceback" not in done.err
    assert (tmp_path / "there.json").read_text() == "mine"
