"""Our training loop and exact evaluation against transformers.Trainer, in one run: a Markdown table.

    python benchmarks/training.py [--steps N] [--repeats R] [--trainer JSON] [--output FILE]

Both train the same small GPT-2 from the same weights on the same blocks in the same order, with two processes of
`accelerate launch` on the CPU, and take turns, so that what else happens on the machine meets both.
"""

import argparse
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from statistics import harmonic_mean, median

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "accelerate.commands.launch --config_file accelerate_configs/ddp.yaml --num_processes 2 --main_process_port 0"
BATCH, BLOCK, LR, DECAY, SEED = 16, 128, 2e-3, 0.1, 42  # BATCH: sequences per step over both processes
LOG_EVERY = 20  # steps; the first LOG_EVERY are not timed
MODEL = {"vocab_size": 2048, "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": BLOCK}
MODEL |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # so that the losses can be compared
DATA = {"source": "recipes/eli5_sample.jsonl", "text_column": "answers.text", "block_size": BLOCK}
TITLE = "# Training and evaluation against transformers.Trainer, on the CPU"
NOTES = f"""\
GPT-2 from scratch ({MODEL["n_layer"]} layers of {MODEL["n_embd"]}, vocabulary {MODEL["vocab_size"]}, no dropout), fp32, \
{BATCH} x {BLOCK} tokens per step, AdamW, linear schedule,
clipping at 1, two processes of one thread each. What Trainer is not told stays its default. Runs alternate: clm-dist,
Trainer, clm-dist, ... A cell is median (smallest to largest). The machine was shared with other work.

- training, tokens/s: of both processes together, without the first {LOG_EVERY} steps.
- whole command: from `accelerate launch` to its end. Ours writes a run folder and the final model, Trainer saves nothing.
- peak memory: resident, of the larger process.
- evaluation, s: after loading, between barriers. Ours also counts next-token accuracy.
- loss: Trainer divides GPT-2's by all {BLOCK} tokens of a block, though {BLOCK - 1} are scored; "per scored token" undoes
  that. With two processes its evaluation also gives wrong weight to a last batch that had to be filled up.
"""
ROWS = {  # title: (figure, format)
    "training, tokens/s": ("train tokens_per_second", ",.0f"),
    "training, whole command, s": ("train wall", ".1f"),
    "training, peak memory, MiB": ("train memory", ",.0f"),
    f"training loss, last {LOG_EVERY} steps": ("train loss", ".5f"),
    "the same per scored token": ("train scored_loss", ".5f"),
    "evaluation, s": ("evaluate seconds", ".2f"),
    "evaluation, whole command, s": ("evaluate wall", ".1f"),
    "evaluation loss": ("evaluate loss", ".5f"),
    "the same per scored token ": ("evaluate scored_loss", ".5f"),
}


# ---- The workers, launched once per process; each returns what it measured


def clm_dist(*argv: str) -> dict[str, float]:
    """`clm-dist ARGV`, with a clock around the evaluation."""
    from clm_dist.cli import main

    measured = {}
    if argv[0] == "evaluate":
        from clm_dist.training import evaluate_command

        def timed(accelerator, *arguments, evaluate=evaluate_command.evaluate):
            accelerator.wait_for_everyone()
            begin = time.perf_counter()
            loss = (result := evaluate(accelerator, *arguments)).loss
            measured.update(seconds=time.perf_counter() - begin, loss=loss, scored_loss=loss)
            return result

        evaluate_command.evaluate = timed
    if code := main(argv):
        sys.exit(code)
    return measured


def trainer_train(train_blocks: str, steps: str, further: str) -> dict[str, float]:
    """The same training as a user of Trainer writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.end = time.perf_counter()
            if state.global_step == LOG_EVERY:
                self.begin = self.end

    set_seed(SEED)
    model, rows, clock = GPT2LMHeadModel(GPT2Config(**MODEL)), block_rows(train_blocks, int(steps)), Clock()
    settings = {"per_device_train_batch_size": BATCH // 2, "max_steps": int(steps), "weight_decay": DECAY, "use_cpu": True}
    settings |= {"learning_rate": LR, "lr_scheduler_type": "linear", "logging_steps": LOG_EVERY, "save_strategy": "no"}
    settings |= {"train_sampling_strategy": "sequential"}  # the rows lie in our order already
    arguments = TrainingArguments(report_to="none", **settings, **json.loads(further))
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
    trainer.train()
    loss = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
    speed = (int(steps) - LOG_EVERY) * BATCH * BLOCK / (clock.end - clock.begin)
    return {"tokens_per_second": speed, "loss": loss, "scored_loss": loss * BLOCK / (BLOCK - 1)}


def trainer_evaluate(eval_blocks: str, model_folder: str) -> dict[str, float]:
    """The same evaluation with Trainer; batches of 8 are the default of both."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model, rows = AutoModelForCausalLM.from_pretrained(model_folder), block_rows(eval_blocks)
    trainer = Trainer(model, TrainingArguments(report_to="none", use_cpu=True), eval_dataset=rows)
    trainer.accelerator.wait_for_everyone()
    begin = time.perf_counter()
    loss = trainer.evaluate()["eval_loss"]
    return {"seconds": time.perf_counter() - begin, "loss": loss, "scored_loss": loss * BLOCK / (BLOCK - 1)}


def block_rows(folder: str, steps: int = 0):
    """A torch Dataset of prepared blocks: all of them once, or those of `steps` steps in the order in which we train."""
    import torch
    from torch.utils.data import StackDataset, Subset

    from clm_dist.data.blocks import Blocks
    from clm_dist.data.order import global_batch

    blocks = Blocks(Path(folder))
    input_ids = torch.from_numpy(blocks[range(len(blocks))].astype("int64"))
    order = [i for step in range(steps) for i in global_batch(step, BATCH, len(blocks), SEED).tolist()]
    return Subset(StackDataset(input_ids=input_ids, labels=input_ids), order or range(len(blocks)))


# ---- The runs


def execute(module: str, *arguments: str | Path, cwd: Path = ROOT) -> float:
    """Runs `python -m MODULE ARGUMENTS`; returns how long it took, in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command, begin = [sys.executable, "-m", *module.split(), *arguments], time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - begin


def measure(folder: Path, steps: int, repeats: int, further: str) -> dict[str, list[float]]:
    """'side job figure': its value in each repeat."""
    found, training, evaluation, run = defaultdict(list), folder / "train.yaml", folder / "evaluate.yaml", folder / "run"
    data = {**DATA, "prepared_dir": f"{folder}/one", "tokenizer_vocab_size": MODEL["vocab_size"], "eval_fraction": 0}
    optim, train = {"lr": LR, "weight_decay": DECAY}, {"max_steps": steps, "global_batch_size": BATCH, "log_every": LOG_EVERY}
    recipe = {"run_dir": str(run), "seed": SEED, "data": data, "optim": optim, "train": train}
    recipe["model"] = {"type": "gpt2", "config": MODEL}
    training.write_text(json.dumps(recipe))
    recipe["data"] = {**DATA, "prepared_dir": f"{folder}/two", "tokenizer": f"{folder}/one/tokenizer", "eval_fraction": 0.9}
    evaluation.write_text(json.dumps(recipe))
    for path in (training, evaluation):
        execute("clm_dist prepare", path)

    def launch(job: str, worker, *arguments: str | Path) -> None:
        wall = execute(LAUNCH, __file__, "worker", folder, worker.__name__, *arguments)
        first, second = (json.loads((folder / f"measured-{rank}.json").read_text()) for rank in (0, 1))
        figures = {**first, "memory": max(first["memory"], second["memory"]), "wall": wall}
        if job == "clm-dist train":
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            speeds = [row["perf/tokens_per_second"] for row in rows[1:]]  # of LOG_EVERY steps each
            figures |= {"tokens_per_second": harmonic_mean(speeds), "loss": rows[-1]["train/loss"]}
            figures["scored_loss"] = figures["loss"]
        print(f"{job}: {figures}", file=sys.stderr)
        for name, value in figures.items():
            found[f"{job} {name}"].append(value)

    for _ in range(repeats):
        launch("clm-dist train", clm_dist, "train", training, "--overwrite")
        launch("Trainer train", trainer_train, folder / "one" / "train", str(steps), further)
        launch("clm-dist evaluate", clm_dist, "evaluate", evaluation)
        launch("Trainer evaluate", trainer_evaluate, folder / "two" / "eval", run / "model")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, choices=range(2 * LOG_EVERY, 10**6, LOG_EVERY), metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    parser.add_argument("--trainer", default="{}", metavar="JSON", help="further TrainingArguments for the training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: the table, command, versions, hardware")
