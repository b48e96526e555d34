"""The second half of checkpoint.py: from the start of the command to its first step, resumed early and late in a plan."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, cell, verdict

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}  # of the tests
EARLY, LATE, PLANNED = 10, 10_000, 20_000
BOUND = 1.2
WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "tree",
    "house",
    "water",
    "fire",
    "runs",
    "sees",
    "likes",
    "finds",
    "under",
    "near",
]


def recipe(folder: Path, run: Path, shape: dict[str, int]) -> dict[str, Any]:
    """A recipe over little text; a plan long enough for both checkpoints."""
    data = {"source": str(folder / "texts.jsonl"), "prepared_dir": str(folder / "prepared"), "eval_fraction": 0.2}
    train = {"max_steps": PLANNED, "global_batch_size": 4, "log_every": 100}
    values = {"run_dir": str(run), "data": {**data, "tokenizer_vocab_size": 300, "block_size": 16}, "train": train}
    return {**values, "model": {"type": "gpt2", "config": shape}, "evaluate": {"every_steps": PLANNED}}


def write_recipe(folder: Path, run: Path, save_every: int) -> Path:
    """The recipe of a run that keeps its checkpoints of every so many steps."""
    path = run.with_suffix(".yaml")
    keep = {"save_every": save_every, "keep_every": save_every}
    path.write_text(json.dumps(recipe(folder, run, TINY) | {"checkpoint": keep}))
    return path


def command(*arguments: str | Path) -> subprocess.Popen:
    """`clm-dist ARGUMENTS`, started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "clm_dist", *map(str, arguments)]
    return subprocess.Popen(program, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def rows(run: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The whole rows of a ledger after so many bytes."""
    path = run / "ledger.jsonl"
    text = path.read_bytes()[offset:] if path.is_file() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def stopped_after(folder: Path, step: int) -> Path:
    """A run that was asked to stop after a step, with the checkpoint of that step alone."""
    run = folder / f"run-{step}"
    process = command("train", write_recipe(folder, run, step))
    wanted = run / "checkpoints" / f"step-{step:08d}"
    while not (wanted / "COMMITTED").is_file():
        if process.poll() is not None:
            sys.exit(f"training to step {step} ended with {process.returncode}")
        time.sleep(0.05)
    (run / "STOP").touch()
    process.wait()
    for path in (run / "checkpoints").iterdir():
        if path != wanted:  # of the stop, some steps later
            shutil.rmtree(path)
    return run


def resume(folder: Path, stopped: Path, step: int) -> float:
    """Resumes a copy of a run; returns the seconds from the start of the process to its first step."""
    run = folder / "resumed"
    shutil.copytree(stopped, run)
    path, size = write_recipe(folder, run, PLANNED), (run / "ledger.jsonl").stat().st_size
    os.sync()
    began = time.time()
    process = command("train", path)
    try:
        while not (first := next((row for row in rows(run, size) if row["event"] == "step"), None)):
            if process.poll() is not None:
                sys.exit(f"resuming at step {step} ended with {process.returncode}")
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    if first["step"] != step + 1:
        sys.exit(f"resumed before step {first['step']}, not {step + 1}")
    shutil.rmtree(run)
    return first["time"] - began


def measure_resuming(folder: Path, repeats: int) -> dict[int, list[float]]:
    """Seconds by step; the steps taking turns; one turn is not counted."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + "." for _ in range(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if command("prepare", write_recipe(folder, folder / "run", EARLY)).wait():
        sys.exit("preparing failed")
    runs = {step: stopped_after(folder, step) for step in (EARLY, LATE)}
    found: dict[int, list[float]] = defaultdict(list)
    for number in range(1 + repeats):
        for step, run in runs.items():
            seconds = resume(folder, run, step)
            print("resumed at", step, seconds, file=sys.stderr)
            found[step] += [seconds] if number else []
    return found


def resuming_table(found: dict[int, list[float]]) -> str:
    """Early beside late."""
    early, late = found[EARLY], found[LATE]
    ratio = median(late) / median(early)
    return f"""\
| s | at step {EARLY:,} | at step {LATE:,} | ratio |
|---|---|---|---|
| from the start of a resuming process to its first step | {cell(early, ".2f")} | {cell(late, ".2f")} | {ratio:.3f} |

{verdict(f"step {LATE:,} / step {EARLY:,}", [ratio], BOUND)}"""
