"""What a checkpoint costs training, against Accelerate's `save_state`; and what a resume costs, early and late in a plan.

    python benchmarks/checkpoint.py [--rounds N] [--repeats R] [--folder FOLDER] [--output FILE]

Saving: GPT-2 in DistilGPT2's shape and its AdamW, by one process and by two. Resuming: the real command over a tiny
model, from a checkpoint of step 10 and from one of step 10,000.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import ROOT, cell, facts, verdict
from resuming import EARLY, LATE, PLANNED, TINY, measure_resuming, recipe, resuming_table

SHAPE = {"n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
TOKENS = 64  # of each process's training step
SYNCHRONOUS, ASYNCHRONOUS = 1.3, 0.25  # the bounds
PEER, DURABLE, OURS, STALL = "peer", "durable", "ours", "stall"
ROWS = {
    PEER: ("`accelerator.save_state`", ".3f"),
    DURABLE: ("the same, and fsync of its files", ".3f"),
    OURS: ("`Saver.save(wait=True)`: until committed", ".3f"),
    STALL: ("`Saver.save(wait=False)`: until training goes on", ".3f"),
    "first": ("the same, the first of a run", ".3f"),
    "committed": ("the same, until committed, training meanwhile", ".3f"),
    "lost": ("the same, training time lost in all", ".3f"),
    "alone": ("training steps/s, nothing being written", ".2f"),
    "beside": ("training steps/s, a checkpoint being written", ".2f"),
}
NOTES = f"""\
Saving: {SHAPE}, fp32, AdamW with state; the three ways took turns in one process (or pair of processes
started by `accelerate launch`), after one round that is not counted (but for `the first of a run`). Before each timing
training takes a step, `sync` has emptied the page cache of dirty pages, and all ranks meet; the figure is the largest over
the ranks. A cell is median (smallest to largest) over the rounds, of seconds where it says nothing else.

- `save_state`: into a fresh folder, which is removed outside the timed part; no fsync, no hash, no commit. fsync: of each of
  its files and of the folder, by the main process: durable as ours is, still not verifiable.
- `Saver.save`: SHA-256 over everything, fsync of every file and folder, commit; removes the checkpoint before (keep_last=1).
- training time lost in all: the stall, and what the steps during the write took longer than as many alone.
- training step: forward, backward, gradients exchanged, AdamW, 1 x {TOKENS} tokens a process. While a checkpoint is being
  written: from the return of `Saver.save` to the end of the first step after the commit. Alone: as many steps right after.

Resuming: `clm-dist train` by one process of one thread, a model of
{TINY}, train.max_steps={PLANNED}; two runs were stopped soon after the steps
{EARLY:,} and {LATE:,}, and keep the checkpoint of that step alone. Each repeat resumes a fresh copy; the two took turns, the
first turn is not counted. To the first step: until its row of the ledger, so that the step itself counts. The machine did
other work at the same time: smallest figures say more of the code, medians more of the machine.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of saving (7)")
    parser.add_argument("--repeats", type=int, default=7, metavar="R", help="of resuming (7)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: tables, command, versions, hardware")
    args = parser.parse_args()
    if args.rounds < 1 or args.repeats < 1:
        parser.error("--rounds and --repeats take 1 or more")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saving = [launch_saving(Path(folder), processes, args.rounds) for processes in (1, 2)]
        resuming = measure_resuming(Path(folder), args.repeats)
    tables = f"{saving_table(saving)}\n{resuming_table(resuming)}"
    print(tables)
    if args.output:
        told = facts(f"benchmarks/checkpoint.py --rounds {args.rounds} --repeats {args.repeats}")
        args.output.write_text(
            f"# Saving against save_state; resuming late against early\n\n{tables}\n{told}\n\n{NOTES}"
        )


def launch_saving(folder: Path, processes: int, rounds: int) -> dict[str, list[float]]:
    """Figures by the names of ROWS, measured in processes of their own."""
    folder = folder / f"saving-{processes}"
    folder.mkdir()
    command = [sys.executable]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml")]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    subprocess.run([*command, __file__, "saving", folder, str(rounds)], cwd=ROOT, env=environment, check=True)
    found = json.loads((folder / "figures.json").read_text())
    shutil.rmtree(folder)
    return found


class Saving:
    """One rank of the processes in which the ways of saving take turns."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        from clm_dist.config import Config, OptimConfig
        from clm_dist.engine.replicated import Replicated
        from clm_dist.training.optimizer import make_optimizer
        from clm_dist.training.runtime import start
        from clm_dist.training.saver import Saver
        from clm_dist.training.state import TrainState
        from clm_dist.watch.watch import Watch

        self.folder, self.accelerator = folder, start("no")
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**SHAPE, use_cache=False))
        self.engine = Replicated(self.accelerator, model, make_optimizer(model, OptimConfig()), max_norm=None)
        values = recipe(folder, folder / "run", SHAPE) | {"checkpoint": {"keep_last": 1}}
        arguments = (Config.model_validate(values), self.engine, folder / "run", Watch())
        self.saver, self.state = Saver(self.accelerator, *arguments), TrainState()
        self.ids = torch.randint(SHAPE["vocab_size"], (1, TOKENS))
        self.found: dict[str, list[float]] = defaultdict(list)
        self.train(3)

    def train(self, steps: int) -> float:
        """Takes steps as training does; returns seconds."""
        began = time.monotonic()
        for _ in range(steps):
            self.engine.backward(self.engine.model(input_ids=self.ids, labels=self.ids).loss)
            self.engine.step(update=True)
            self.state.step += 1  # else the Saver has nothing to do
        return time.monotonic() - began

    def quiet(self) -> None:
        """Nobody pays for what another has left to be written."""
        self.train(1)
        if self.accelerator.is_main_process:
            os.sync()
        self.accelerator.wait_for_everyone()

    def largest(self, seconds: float) -> float:
        """Over the ranks."""
        import torch

        return float(self.accelerator.gather(torch.tensor([seconds], dtype=torch.float64)).max())

    def save(self, wait: bool) -> float:
        """Ours; returns the seconds until training may go on."""
        began = time.monotonic()
        self.saver.save(self.state, {}, wait)
        return self.largest(time.monotonic() - began)

    def round(self, number: int) -> None:
        """Every way once; who begins rotates, since what went before leaves its traces in the page cache."""
        ways = (lambda: self.peer(number), self.synchronous, self.asynchronous)
        for way in ways[number % 3 :] + ways[: number % 3]:
            self.quiet()
            way()

    def peer(self, number: int) -> None:
        """Accelerate's, and what it would take to make that last."""
        target = self.folder / f"peer-{number}"
        began = time.monotonic()
        self.accelerator.save_state(str(target))
        own = time.monotonic() - began
        if self.accelerator.is_main_process:
            for path in (*target.iterdir(), target):
                force(path)
        for name, seconds in ((PEER, own), (DURABLE, time.monotonic() - began)):
            self.found[name].append(self.largest(seconds))
        if self.accelerator.is_main_process:
            shutil.rmtree(target)

    def synchronous(self) -> None:
        """Ours, until it is committed."""
        self.found[OURS].append(self.save(wait=True))

    def asynchronous(self) -> None:
        """Ours, until training goes on; and how it goes on."""
        self.found[STALL].append(self.save(wait=False))
        self.beside()

    def beside(self) -> None:
        """Trains until the save under way is done, and then as long without one."""
        requested, steps, took = self.state.step, 0, 0.0
        main = self.accelerator.is_main_process
        while self.largest(float(main and self.saver.newest < requested)):
            took += self.train(1)
            steps += 1
        self.saver.wait()
        if self.saver.problem:
            sys.exit(self.saver.problem)
        self.found["committed"].append(self.largest(self.state.save_seconds))
        self.quiet()
        alone = self.train(max(1, steps))
        self.found["beside"].append(steps / took if took else 0.0)
        self.found["alone"].append(max(1, steps) / alone)
        self.found["lost"].append(self.found[STALL][-1] + max(0.0, took - alone))


def force(path: Path) -> None:
    """To disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure_saving(folder: str, rounds: str) -> None:
    """On every rank; the main process leaves the figures in the folder."""
    saving = Saving(Path(folder))
    for number in range(1 + int(rounds)):
        saving.round(number)
        if saving.accelerator.is_main_process:
            print({name: round(values[-1], 3) for name, values in saving.found.items()}, file=sys.stderr)
    if saving.accelerator.is_main_process:
        figures = {name: values[1:] for name, values in saving.found.items()} | {"first": saving.found[STALL][:1]}
        (Path(folder) / "figures.json").write_text(json.dumps(figures))
    saving.accelerator.end_training()


def saving_table(found: list[dict[str, list[float]]]) -> str:
    """One process beside two, each against the peer; then whether the bounds hold."""
    table = (
        "| training stands still, s | 1 process | / save_state | 2 processes | / save_state |\n|---|---|---|---|---|\n"
    )
    for name, (title, form) in ROWS.items():
        cells = [title]
        for figures in found:
            ratio = median(figures[name]) / median(figures[PEER])
            cells += [cell(figures[name], form), "" if "steps/s" in title else f"{ratio:.2f}"]
        table += f"| {' | '.join(cells)} |\n"
    lines = []
    for name, bound, what in ((OURS, SYNCHRONOUS, "synchronous"), (STALL, ASYNCHRONOUS, "asynchronous")):
        ratios = [median(figures[name]) / median(figures[PEER]) for figures in found]
        lines.append(verdict(f"{what} / save_state, 1 and 2 processes", ratios, bound))
    return table + "\n" + "".join(lines)


if __name__ == "__main__":
    measure_saving(*sys.argv[2:]) if sys.argv[1:2] == ["saving"] else main()
