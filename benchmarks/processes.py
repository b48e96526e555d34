"""Two processes against one with half of the threads: what `clm-dist train` makes of a second core; a Markdown table.

    python benchmarks/processes.py [--cases NAME ...] [--repeats R] [--output FILE]

Each process has one thread and as many sequences a step as the other, so that two would ideally do twice as much as one.
Two cores of one machine share memory and clock: "side by side" are two commands of one process each, at the same time,
which know nothing of each other, and so what this machine makes of two.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import ROOT, cell, facts, table
from speed import ON_CPU, recipe

CASES = ["small, vocabulary 2,048", "small, vocabulary 50,257", "DistilGPT2, block 128"]
HEAD = "case | one process, tokens/s | side by side, both | two processes | two / twice one | two / side by side"
LAUNCH = "accelerate.commands.launch --config_file accelerate_configs/ddp.yaml --num_processes 2 --main_process_port 0"


def begin(path: Path, run: Path, processes: int, batch: int) -> subprocess.Popen[str]:
    """`clm-dist train`, on its way."""
    program = ["-m", *LAUNCH.split(), "-m", "clm_dist"] if processes > 1 else ["-m", "clm_dist"]
    overrides = [f"run_dir={run}", f"train.global_batch_size={batch * processes}", "--overwrite"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with run.with_suffix(".err").open("w") as said:
        return subprocess.Popen(
            [sys.executable, *program, "train", str(path), *overrides],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said, text=True,
        )  # fmt: skip


def speed(process: subprocess.Popen[str], run: Path) -> float:
    """Tokens/s of all its processes, without the first log line; RuntimeError where it fails."""
    if process.wait():
        raise RuntimeError(run.with_suffix(".err").read_text()[-2000:])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median([row["perf/tokens_per_second"] for row in rows if "train/loss" in row][1:])


def measure(name: str, repeats: int, folder: Path) -> list[str]:
    """One row: the three ways in turns."""
    path, batch = recipe(name, ON_CPU[name], folder), ON_CPU[name]["batch"]
    one, beside, two = [], [], []
    for _ in range(repeats):
        runs = [folder / "a", folder / "b"]
        one.append(speed(begin(path, runs[0], 1, batch), runs[0]))
        both = [begin(path, run, 1, batch) for run in runs]
        beside.append(sum(speed(process, run) for process, run in zip(both, runs, strict=True)))
        two.append(speed(begin(path, runs[0], 2, batch), runs[0]))
        print(name, one[-1], beside[-1], two[-1], file=sys.stderr, flush=True)
    cells = [cell(values, ",.0f") for values in (one, beside, two)]
    ideal = [b / (2 * a) for a, b in zip(one, two, strict=True)]
    shared = [b / a for a, b in zip(beside, two, strict=True)]
    return [name, *cells, cell(ideal, ".2f"), cell(shared, ".2f")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: table, command, versions, hardware")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, args.repeats, Path(folder)) for name in args.cases]
    made = facts(shlex.join(["benchmarks/processes.py", "--repeats", str(args.repeats), "--cases", *args.cases]))
    text = f"{table('Two processes on two cores', HEAD, rows)}\n{made}\n"
    print(text)
    if args.output:
        args.output.write_text(f"# What a second core adds\n{text}\n{__doc__.split('[--output FILE]')[1].strip()}\n")


if __name__ == "__main__":
    main()
