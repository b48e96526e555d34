"""Our training loop and exact evaluation against transformers.Trainer, in one run: a Markdown table.

    python benchmarks/training.py [--steps N] [--repeats R] [--output FILE]

Both train the same small GPT-2 from the same weights on the same blocks in the same order, with two processes of
`accelerate launch`, and take turns, so that what else happens on the machine meets both.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from statistics import harmonic_mean, median

ROOT = Path(__file__).parents[1]
PROCESSES, BATCH, BLOCK = 2, 16, 128  # sequences per step over all processes; tokens per sequence
LOG_EVERY = 20  # the first LOG_EVERY steps are not timed
VOCABULARY, LR, DECAY, SEED = 2048, 2e-3, 0.1, 42
MODEL = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": BLOCK}
MODEL |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # so that the losses can be compared
RECIPE = [
    *("recipes/demo.yaml", f"data.block_size={BLOCK}", f"seed={SEED}", "generate.prompts=[]"),
    *(f"model.config.{name}={value}" for name, value in MODEL.items()),
    *(f"optim.lr={LR}", f"optim.weight_decay={DECAY}", "optim.schedule=linear", "optim.warmup_steps=0"),
    *("train.epochs=null", f"train.global_batch_size={BATCH}", f"train.log_every={LOG_EVERY}"),
]
SETTING = f"""\
GPT-2 from scratch ({MODEL["n_layer"]} layers of {MODEL["n_embd"]}, vocabulary {VOCABULARY}, no dropout), fp32, {BATCH} x \
{BLOCK} tokens per step over {PROCESSES} processes of one thread each, AdamW, linear schedule, clipping at 1. What Trainer
is not told stays its default. Runs alternate: clm-dist, Trainer, clm-dist, ... Each cell: median (smallest to largest).
The machine was shared with other work, so small differences mean nothing.

- tokens/s: all processes together, without the first {LOG_EVERY} steps.
- whole command: from `accelerate launch` to its end. Ours writes the run folder and the final model, Trainer saves nothing.
- peak memory: resident, of the larger process.
- evaluation, s: between barriers, after loading. Ours also counts next-token accuracy.
- losses: nats per token. Trainer divides GPT-2's by all {BLOCK} tokens of a block, though {BLOCK - 1} are scored: its figure
  times {BLOCK}/{BLOCK - 1} is to be compared. Its evaluation counts the blocks that fill up the last batch too.
"""
ROWS = {  # title: (figure, format)
    "training, tokens/s": ("train tokens_per_second", ",.0f"),
    "training, whole command, s": ("train wall", ".1f"),
    "training, peak memory of a process, MiB": ("train memory", ",.0f"),
    f"training loss of the last {LOG_EVERY} steps": ("train loss", ".5f"),
    "evaluation, s": ("evaluate seconds", ".2f"),
    "evaluation, whole command, s": ("evaluate wall", ".1f"),
    "evaluation loss": ("evaluate loss", ".5f"),
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
            result = evaluate(accelerator, *arguments)
            measured.update(seconds=time.perf_counter() - begin, loss=result.loss)
            return result

        evaluate_command.evaluate = timed
    if code := main(argv):
        sys.exit(code)
    return measured


def trainer_train(folder: str, steps: str) -> dict[str, float]:
    """The same training as a user of Trainer writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.end = time.perf_counter()
            if state.global_step == LOG_EVERY:
                self.begin = self.end

    set_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **MODEL))
    settings = {"per_device_train_batch_size": BATCH // PROCESSES, "max_steps": int(steps), "weight_decay": DECAY}
    settings |= {"learning_rate": LR, "lr_scheduler_type": "linear", "logging_steps": LOG_EVERY, "save_strategy": "no"}
    settings |= {"train_sampling_strategy": "sequential"}  # the rows lie in our order already
    arguments = TrainingArguments(folder, report_to="none", use_cpu=True, **settings)
    rows, clock = block_rows(Path(folder) / "prepared" / "train", int(steps)), Clock()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    timed_tokens = (int(steps) - LOG_EVERY) * BATCH * BLOCK
    return {"loss": losses[-1], "tokens_per_second": timed_tokens / (clock.end - clock.begin)}


def trainer_evaluate(folder: str, model_folder: str) -> dict[str, float]:
    """The same evaluation with Trainer; batches of 8 are the default of both."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = block_rows(Path(folder) / "prepared-eval" / "eval")
    trainer = Trainer(model, TrainingArguments(folder, report_to="none", use_cpu=True), eval_dataset=rows)
    trainer.accelerator.wait_for_everyone()
    begin = time.perf_counter()
    loss = trainer.evaluate()["eval_loss"]
    return {"seconds": time.perf_counter() - begin, "loss": loss}


def block_rows(folder: Path, steps: int = 0):
    """A torch Dataset of prepared blocks: all of them once, or those of `steps` steps in the order in which we train."""
    import torch
    from torch.utils.data import StackDataset, Subset

    from clm_dist.data.blocks import Blocks
    from clm_dist.data.order import global_batch

    blocks = Blocks(folder)
    input_ids = torch.from_numpy(blocks[range(len(blocks))].astype("int64"))
    order = [i for step in range(steps) for i in global_batch(step, BATCH, len(blocks), SEED).tolist()]
    rows = StackDataset(input_ids=input_ids, labels=input_ids)  # the model shifts the labels itself
    return Subset(rows, order or range(len(rows)))


# ---- The runs


def execute(*command: str | Path) -> float:
    """Runs a command to its end; returns how long it took, in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - begin


def launch(folder: Path, worker, *arguments: str | Path) -> dict[str, float]:
    """What `worker` measured in two launched processes, their peak memory, and the time of the whole command."""
    options = (
        "--config_file",
        "accelerate_configs/ddp.yaml",
        "--num_processes",
        str(PROCESSES),
        "--main_process_port",
        "0",
    )
    command = (
        "-m",
        "accelerate.commands.launch",
        *options,
        Path(__file__).resolve(),
        "worker",
        folder,
        worker.__name__,
    )
    wall = execute(*command, *arguments)
    ranks = [json.loads((folder / f"measured-{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {**ranks[0], "memory": max(rank["memory"] for rank in ranks), "wall": wall}


def measure(folder: Path, steps: int, repeats: int) -> str:
    """The table of medians."""
    recipe = [*RECIPE, f"train.max_steps={steps}"]
    training = [*recipe, f"data.prepared_dir={folder}/prepared", "data.eval_fraction=0"]
    evaluation = [*recipe, f"data.prepared_dir={folder}/prepared-eval", "data.eval_fraction=0.9"]
    evaluation += [f"data.tokenizer={folder}/prepared/tokenizer", "data.tokenizer_vocab_size=null"]
    execute("-m", "clm_dist", "prepare", *training)
    execute("-m", "clm_dist", "prepare", *evaluation)
    found = defaultdict(list)
    for repeat in range(repeats):
        run = folder / f"run-{repeat}"
        ours = launch(folder, clm_dist, "train", *training, f"run_dir={run}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        speeds = [row["perf/tokens_per_second"] for row in rows if row["step"] > LOG_EVERY]  # of LOG_EVERY steps each
        ours |= {"tokens_per_second": harmonic_mean(speeds), "loss": rows[-1]["train/loss"]}
        jobs = {"clm-dist train": ours, "Trainer train": launch(folder, trainer_train, folder, str(steps))}
        jobs["clm-dist evaluate"] = launch(folder, clm_dist, "evaluate", *evaluation, "--model", run / "model")
        jobs["Trainer evaluate"] = launch(folder, trainer_evaluate, folder, run / "model")
        for job, figures in jobs.items():
            print(f"{repeat + 1} of {repeats}, {job}: {figures}", file=sys.stderr)
            for name, value in figures.items():
                found[f"{job} {name}"].append(value)
    lines = ["| | clm-dist | Trainer | clm-dist / Trainer |", "|---|---|---|---|"]
    for title, (name, form) in ROWS.items():
        sides = found[f"clm-dist {name}"], found[f"Trainer {name}"]
        cells = [f"{median(side):{form}} ({min(side):{form}} to {max(side):{form}})" for side in sides]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {median(sides[0]) / median(sides[1]):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"a multiple of {LOG_EVERY}, at least {2 * LOG_EVERY}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Markdown file for the table, with command, versions and hardware")
    args = parser.parse_args()
    if args.steps % LOG_EVERY or args.steps < 2 * LOG_EVERY or args.repeats < 1:
        parser.error(f"--steps must be a multiple of {LOG_EVERY}, at least {2 * LOG_EVERY}; --repeats at least 1")
    from clm_dist.versions import versions

    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.steps, args.repeats)
    print(result)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts = [
        f"`python benchmarks/training.py --steps {args.steps} --repeats {args.repeats}`, {date.today()}",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"{os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}",
    ]
    if args.output:
        text = "\n\n".join(["# Training and evaluation against transformers.Trainer, CPU", result, *facts, SETTING])
        args.output.write_text(text, encoding="utf-8")


def work(folder: str, worker: str, *arguments: str) -> None:
    """One launched process: runs the worker and leaves as clm-dist does, without the interpreter's tear-down."""
    measured = {"clm_dist": clm_dist, "trainer_train": trainer_train, "trainer_evaluate": trainer_evaluate}[worker](
        *arguments
    )
    measured["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
    (Path(folder) / f"measured-{os.environ['RANK']}.json").write_text(json.dumps(measured))
    os._exit(0)


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main()
