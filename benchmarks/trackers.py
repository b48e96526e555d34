"""What dashboards cost training: none, W&B that answers, W&B that is not there, W&B that hangs.

    python benchmarks/trackers.py [--repeats R] [--steps N] [--output FILE]

The real command, one process of one thread, the real `wandb` client, and the local endpoint of the tests.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import ROOT, cell, facts

sys.path.insert(0, str(ROOT / "tests"))

from conftest import prepare_recipe
from local_wandb import LocalWandb

BOUND = 1.02
WAYS = {
    "none": "no tracker",
    "well": "W&B answers",
    "unreachable": "W&B is not there (connection refused)",
    "hang": "W&B takes the connection and never answers",
}
NOTES = """\
Loop: from the first row of metrics.jsonl (the evaluation before step 1) to the last. Command: the whole of `clm-dist train`,
with imports, exports and the wait for the courier at the end (track.wait_seconds at its default). Loss of every step logged,
one thread of training on a machine of several cores; the ways took turns in an order drawn for each round, after one round
that is not counted. A cell is median (smallest to largest) in seconds. / none: the median of the rounds' ratios.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    loops, commands = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as name, LocalWandb() as server:
        folder = Path(name)
        model = {"config": {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 64}}
        train = {"max_steps": args.steps, "log_every": 1}
        recipe = prepare_recipe(folder, 400, model=model, train=train, evaluate={"every_steps": 100})
        for round_number in range(args.repeats + 1):
            for way in random.sample(list(WAYS), len(WAYS)):
                loop, command = measure(recipe, folder / f"{way}-{round_number}", way, server)
                print(f"round {round_number}, {WAYS[way]}: loop {loop:.2f} s, command {command:.2f} s", flush=True)
                if round_number:
                    loops[way].append(loop)
                    commands[way].append(command)
    text = table(loops, commands) + f"\n{facts('benchmarks/trackers.py ' + ' '.join(sys.argv[1:]))}\n\n{NOTES}"
    print(text)
    if args.output:
        args.output.write_text(text)


def measure(recipe: Path, run: Path, way: str, server: LocalWandb) -> tuple[float, float]:
    """Seconds of the loop and of the command."""
    server.behave("hang" if way == "hang" else "well")
    environment = {**os.environ, **server.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if way == "unreachable":
        environment["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    trackers = "[]" if way == "none" else "[wandb]"
    command = [sys.executable, "-m", "clm_dist", "train", str(recipe), f"run_dir={run}", f"track.trackers={trackers}"]
    began = time.monotonic()
    subprocess.run([*command, "track.wandb_mode=online"], env=environment, check=True, capture_output=True)
    seconds = time.monotonic() - began
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return times[-1] - times[0], seconds


def table(loops: dict[str, list[float]], commands: dict[str, list[float]]) -> str:
    """Both measures of every way, and whether the bound holds."""
    lines = ["# Training with and without W&B", "", "| | loop | / none | command | / none |", "|---|---|---|---|---|"]
    verdicts = []
    for way, label in WAYS.items():
        ratios = [
            median(one / none for one, none in zip(figures[way], figures["none"], strict=True))
            for figures in (loops, commands)
        ]
        lines.append(
            f"| {label} | {cell(loops[way], '.2f')} | {ratios[0]:.3f} | {cell(commands[way], '.2f')} | {ratios[1]:.3f} |"
        )
        if way != "none":
            verdicts.append(f"- loop, {label}: at most {BOUND} wanted: {ratios[0]:.3f} {held(ratios[0])}")
    return "\n".join([*lines, "", *verdicts, ""])


def held(ratio: float) -> str:
    return "holds" if ratio <= BOUND else "FAILS"


if __name__ == "__main__":
    main()
