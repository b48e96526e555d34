"""Our training loop and exact evaluation against transformers.Trainer, in one run: a Markdown table.

    python benchmarks/training.py [--steps N] [--repeats R] [--trainer JSON] [--output FILE]

Both train the same small GPT-2 from the same weights on the same blocks in the same order, with two processes of
`accelerate launch` on the CPU, and take turns, so that what else happens on the machine meets both.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import harmonic_mean, median

from common import ROOT, cell, facts

LAUNCH = "accelerate.commands.launch --config_file accelerate_configs/ddp.yaml --num_processes 2 --main_process_port 0"
BATCH, BLOCK, VOCABULARY, LR, DECAY, SEED = 16, 128, 2048, 1e-3, 0.1, 42  # BATCH: sequences a step over both processes
LOG_EVERY = 20  # steps; the first LOG_EVERY are not timed
SCORED = (BLOCK - 1) / BLOCK  # share of the tokens; Trainer divides GPT-2's loss by all
MODEL = {"vocab_size": VOCABULARY, "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": BLOCK}
MODEL |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # so that the losses can be compared
NOTES = f"""\
GPT-2 from scratch (4 layers of 128, vocabulary {VOCABULARY}, no dropout), AdamW, fp32, {BATCH} x {BLOCK} tokens a step, two
processes of one thread each; what Trainer is not told stays its default. The commands took turns on a machine shared
with other work; a cell is median (smallest to largest).

- training, tokens/s: of both processes, without the first {LOG_EVERY} steps. Peak memory: resident, of the larger process.
- whole command: from `accelerate launch` to its end. Ours writes a run folder and the final model, Trainer saves nothing.
- evaluation, s: after loading, between barriers. Ours also counts next-token accuracy.
- loss: nats per scored token. Trainer's, divided by all {BLOCK} tokens though {BLOCK - 1} are scored, is scaled to that.
"""
ROWS = {  # title: (figure, format)
    "training, tokens/s": ("train tokens_per_second", ",.0f"),
    "training, whole command, s": ("train wall", ".1f"),
    "training, peak memory, MiB": ("train memory", ",.0f"),
    f"training loss, last {LOG_EVERY} steps": ("train loss", ".5f"),
    "evaluation, s": ("evaluate seconds", ".2f"),
    "evaluation, whole command, s": ("evaluate wall", ".1f"),
    "evaluation loss": ("evaluate loss", ".5f"),
}


def clm_dist(command: str, recipe: str, *flags: str) -> dict[str, float]:
    """`clm-dist COMMAND RECIPE FLAGS`: speed and loss from its metrics, or those of its evaluation."""
    from clm_dist import cli

    measured = {}
    if command == "evaluate":
        from clm_dist.training import evaluate_command

        def timed(accelerator, *arguments, evaluate=evaluate_command.evaluate):
            accelerator.wait_for_everyone()
            begin = time.perf_counter()
            result = evaluate(accelerator, *arguments)
            measured.update(seconds=time.perf_counter() - begin, loss=result.loss)
            return result

        evaluate_command.evaluate = timed
    if code := cli.main([command, recipe, *flags]):
        sys.exit(code)
    if command == "train":
        metrics = Path(json.loads(Path(recipe).read_text())["run_dir"]) / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]  # each of LOG_EVERY steps
        measured["tokens_per_second"] = harmonic_mean(row["perf/tokens_per_second"] for row in rows[1:])
        measured["loss"] = rows[-1]["train/loss"]
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
    settings = {"learning_rate": LR, "lr_scheduler_type": "linear", "weight_decay": DECAY, "max_steps": int(steps)}
    settings |= {"per_device_train_batch_size": BATCH // 2, "logging_steps": LOG_EVERY, "save_strategy": "no"}
    settings |= {"train_sampling_strategy": "sequential", "report_to": "none", "use_cpu": True, **json.loads(further)}
    arguments = TrainingArguments(f"{train_blocks}.out", **settings)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
    trainer.train()
    loss = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
    speed = (int(steps) - LOG_EVERY) * BATCH * BLOCK / (clock.end - clock.begin)
    return {"tokens_per_second": speed, "loss": loss / SCORED}


def trainer_evaluate(eval_blocks: str, model_folder: str) -> dict[str, float]:
    """The same evaluation with Trainer; batches of 8 are the default of both."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model, rows = AutoModelForCausalLM.from_pretrained(model_folder), block_rows(eval_blocks)
    trainer = Trainer(model, TrainingArguments(f"{eval_blocks}.out", report_to="none", use_cpu=True), eval_dataset=rows)
    trainer.accelerator.wait_for_everyone()
    begin = time.perf_counter()
    loss = trainer.evaluate()["eval_loss"]
    return {"seconds": time.perf_counter() - begin, "loss": loss / SCORED}


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


def execute(module: str, *arguments: str | Path) -> float:
    """Runs `python -m MODULE ARGUMENTS`; returns how long it took, in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command, begin = [sys.executable, "-m", *module.split(), *arguments], time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - begin


def measure(folder: Path, steps: int, repeats: int, further: str) -> dict[str, list[float]]:
    """'side job figure': its value in each repeat."""
    training, evaluation, run = folder / "train.yaml", folder / "evaluate.yaml", folder / "run"
    train = {"max_steps": steps, "global_batch_size": BATCH, "log_every": LOG_EVERY}
    optim, model = {"lr": LR, "weight_decay": DECAY}, {"type": "gpt2", "config": MODEL}
    recipe = {"run_dir": str(run), "seed": SEED, "model": model, "optim": optim, "train": train}
    data = {"source": "recipes/eli5_sample.jsonl", "text_column": "answers.text", "block_size": BLOCK}
    for path, further_data in (
        (training, {"eval_fraction": 0, "tokenizer_vocab_size": VOCABULARY}),
        (evaluation, {"eval_fraction": 0.9, "tokenizer": f"{training}.data/tokenizer"}),
    ):
        path.write_text(json.dumps({**recipe, "data": {**data, **further_data, "prepared_dir": f"{path}.data"}}))
        execute("clm_dist prepare", path)
    found = defaultdict(list)
    for job, worker, *arguments in repeats * (
        ("clm-dist train", clm_dist, "train", training, "--overwrite"),
        ("Trainer train", trainer_train, f"{training}.data/train", str(steps), further),
        ("clm-dist evaluate", clm_dist, "evaluate", evaluation),
        ("Trainer evaluate", trainer_evaluate, f"{evaluation}.data/eval", run / "model"),
    ):
        wall = execute(LAUNCH, __file__, "worker", folder, worker.__name__, *arguments)
        first, second = (json.loads((folder / f"measured-{rank}.json").read_text()) for rank in (0, 1))
        for name, value in {**first, "memory": max(first["memory"], second["memory"]), "wall": wall}.items():
            print(f"{job} {name} {value:.5f}", file=sys.stderr)
            found[f"{job} {name}"].append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="training steps: 40, 60, 80, ... (300)")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="of each command (3)")
    parser.add_argument("--trainer", default="{}", metavar="JSON", help="further TrainingArguments of the training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: table, command, versions, hardware")
    args = parser.parse_args()
    if args.steps < 2 * LOG_EVERY or args.steps % LOG_EVERY or args.repeats < 1:
        parser.error(f"--steps takes a multiple of {LOG_EVERY} from {2 * LOG_EVERY}, --repeats 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.steps, args.repeats, args.trainer)
    table = "| | clm-dist | Trainer | clm-dist / Trainer |\n|---|---|---|---|\n"
    for title, (name, form) in ROWS.items():
        sides = found[f"clm-dist {name}"], found[f"Trainer {name}"]
        cells = f"{cell(sides[0], form)} | {cell(sides[1], form)}"
        table += f"| {title} | {cells} | {median(sides[0]) / median(sides[1]):.3f} |\n"
    print(table)
    if args.output:
        options = f"--steps {args.steps} --repeats {args.repeats} --trainer '{args.trainer}'"
        told = facts(f"benchmarks/training.py {options}")
        args.output.write_text(f"# Training and evaluation against Trainer, CPU\n\n{table}\n{told}\n\n{NOTES}")


def work(folder: str, worker: str, *arguments: str) -> None:
    """One launched process: measures, and leaves as clm-dist does, without the interpreter's tear-down."""
    measured = globals()[worker](*arguments)
    measured["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
    (Path(folder) / f"measured-{os.environ['RANK']}.json").write_text(json.dumps(measured))
    os._exit(0)


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main()
