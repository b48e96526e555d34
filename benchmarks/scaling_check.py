"""Predicted and measured steps of two and three processes on this machine; the part `--check` of scaling.py.

What is predicted from: `clm-dist train` in one process with the micro-batch and thread that each of several will have, the
same in several processes that know nothing of each other, an update of the weights by itself, and collectives of gloo by
themselves. What is measured: `accelerate launch` of the same training. All take turns in every round, in an order that is
drawn, since what else the machine does changes.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, cell, table
from scaling import anatomy_of
from scaling_model import Compute, Fabric, Link, step_seconds

from clm_dist.planning.memory import STRATEGIES

BLOCK, VOCABULARY, FIRST = 128, 2048, 5  # the first steps of a run, and calls of a collective, are not timed
MODEL: dict[str, Any] = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": BLOCK, "vocab_size": VOCABULARY}
MODEL |= dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
SIZES = [2**power for power in (8, 12, 16, 18, 20, 22, 24)]  # bytes of the collectives that are timed
REPEATS = 20  # of each
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
MEASURES: dict[str, Callable[[list[float]], float]] = {
    "the median step": median,
    "the fastest tenth of the steps": lambda seconds: sorted(seconds)[len(seconds) // 10],
}
NOTES = f"""
GPT-2 from scratch (4 layers of 256, vocabulary {VOCABULARY}, no dropout), fp32, blocks of {BLOCK}; one thread a process.
A cell is median (smallest to largest) over the rounds; a ratio is that of one round's prediction to the same round's
measurement. "alone": computing takes as long as in one process alone, times processes / cores where there are more of them;
"side by side": as long as in so many processes that exchange nothing. Exchange is added and not hidden, unless there are
more cores than processes: gloo computes on the same cores. "hidden": what "side by side" would be if it were hidden all the
same.
"""


@dataclass(frozen=True)
class Run:
    """One way to train."""

    engine: str
    processes: int
    micro_batch: int  # sequences
    micro_steps: int = 1

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.processes}-{self.micro_batch}-{self.micro_steps}"


MEASURED = [Run("ddp", 2, 4), Run("ddp", 2, 1), Run("ddp", 2, 1, 4), Run("ddp", 3, 4), Run("ddp", 3, 1)]
MEASURED += [Run("zero3", 2, 4)]


def check(rounds: int, steps: int) -> str:
    """The tables."""
    from scaling_alternating import alternating  # which uses this

    found: dict[str, list[Any]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepared(folder, steps)
        jobs: dict[str, Callable[[], Any]] = {"update": partial(worker, folder, 1, "update")}
        for run in MEASURED:
            one = Run(run.engine, 1, run.micro_batch)
            jobs[run.name] = partial(train, folder, recipe, run)
            jobs[one.name] = partial(train, folder, recipe, one)
            jobs[f"{run.processes} x {one.name}"] = partial(side_by_side, folder, recipe, one, run.processes)
            jobs[f"gloo {run.processes}"] = partial(worker, folder, run.processes, "collectives")
        for number in range(rounds):
            for job in random.sample(list(jobs), len(jobs)):
                begin = time.monotonic()
                found[job].append(jobs[job]())
                told = json.dumps([number + 1, job, found[job][-1], round(time.monotonic() - begin)])
                print(told, file=sys.stderr, flush=True)
        turns = alternating(folder)
    text = "".join(report({job: [one[way] for one in found[job]] for job in found}, way) for way in MEASURES)
    return text + NOTES + turns


def report(found: dict[str, list[Any]], way: str) -> str:
    """Predictions of every round beside its measurements."""
    anatomy, rows = anatomy_of("gpt2", MODEL), []
    rounds = range(len(found["update"]))
    for run in MEASURED:
        one = Run(run.engine, 1, run.micro_batch).name
        predicted = partial(predict, anatomy, run)
        per_round = [
            [found[name][number] for name in (one, f"{run.processes} x {one}", "update", f"gloo {run.processes}")]
            for number in rounds
        ]
        crowd = max(1.0, run.processes / (os.cpu_count() or 1))
        alone = [predicted(lone * crowd, update * crowd, speed) for lone, _, update, speed in per_round]
        beside = [predicted(crowded, update * crowd, speed) for _, crowded, update, speed in per_round]
        hidden = [predicted(crowded, update * crowd, speed, True) for _, crowded, update, speed in per_round]
        computing = [predicted(crowded, update * crowd, None) for _, crowded, update, speed in per_round]
        seconds = found[run.name]
        ratios = [cell([a / b for a, b in zip(p, seconds, strict=True)], ".2f") for p in (alone, beside, hidden)]
        exchange = median(a - b for a, b in zip(beside, computing, strict=True))
        lone = [1e3 * row[0] for row in per_round]
        rows.append([run.engine, str(run.processes), f"{run.micro_steps} x {run.micro_batch}", cell(lone, ".0f"),
                     f"{1e3 * exchange:.0f}", cell([1e3 * s for s in seconds], ".0f"), *ratios])  # fmt: skip
    head = "engine | processes | micro-steps x sequences | one process, ms | exchange, predicted, ms | measured, ms"
    head += " | predicted / measured: alone | side by side | hidden"
    return table(f"By {way}", head, rows) + speeds(found)


def predict(
    anatomy: Any, run: Run, step: float, update: float, speed: dict[str, Any] | None, overlap: bool = False
) -> float:
    """Seconds of a step of several processes, from that of one and the speed of gloo; speed None: nothing is sent."""
    compute = Compute((step - update) / 3, (step - update) * 2 / 3, update)
    kind = "passes" if run.engine == "zero3" else "all_reduce"
    link = Link(*speed[kind]) if speed else Link(float("inf"), 0.0)
    fabric = Fabric(link, link, run.processes)
    overlap = overlap or run.processes < (os.cpu_count() or 1)
    return step_seconds(
        anatomy, BY_NAME[run.engine], run.processes, compute, fabric, run.micro_steps, width=4, overlap=overlap
    )


def speeds(found: dict[str, list[Any]]) -> str:
    """What gloo did by itself."""
    rows = []
    for name, values in sorted(found.items()):
        if name.startswith("gloo"):
            for kind, told in (("all_reduce", "all-reduce"), ("passes", "all-gather, reduce-scatter")):
                bandwidth = cell([value[kind][0] / 1e9 for value in values], ".2f")
                rows.append([name.split()[1], told, cell([1e6 * value[kind][1] for value in values], ".0f"), bandwidth])
    update = cell([1e3 * seconds for seconds in found["update"]], ".1f")
    text = table("gloo by itself, fitted", "processes | collective | latency of a hop, us | bandwidth, GB/s", rows)
    return f"{text}\nAn update of the weights in one process alone: {update} ms.\n"


def fitted(points: Sequence[tuple[float, float]], ranks: int, passes: int) -> tuple[float, float]:
    """Bandwidth and latency of a hop from (bytes, seconds) of ring collectives of so many passes: the line with the least
    squares of relative errors."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_size = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    mean_time = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    above = sum(w * (n - mean_size) * (s - mean_time) for w, (n, s) in zip(weights, points, strict=True))
    slope = above / sum(w * (n - mean_size) ** 2 for w, (n, _) in zip(weights, points, strict=True))
    hops = passes * (ranks - 1)
    return hops / ranks / slope, max(0.0, mean_time - slope * mean_size) / hops


def prepared(folder: Path, steps: int) -> Path:
    """The recipe of all runs, over prepared data."""
    data = {"source": "recipes/eli5_sample.jsonl", "text_column": "answers.text", "block_size": BLOCK}
    data |= {"eval_fraction": 0, "tokenizer_vocab_size": VOCABULARY, "prepared_dir": str(folder / "data")}
    train = {"max_steps": steps, "log_every": 1, "mixed_precision": "no"}
    recipe = folder / "recipe.json"
    model = {"type": "gpt2", "config": MODEL}
    recipe.write_text(json.dumps({"run_dir": str(folder / "run"), "data": data, "model": model, "train": train}))
    ended([sys.executable, "-m", "clm_dist", "prepare", str(recipe)])
    return recipe


def train(folder: Path, recipe: Path, run: Run, name: str = "run") -> dict[str, float]:
    """Seconds of a step, by each measure."""
    return finished(started(folder, recipe, run, name), folder / name)


def side_by_side(folder: Path, recipe: Path, run: Run, count: int) -> dict[str, float]:
    """The same where so many processes train at once, each by itself: the mean of them."""
    names = [f"run{number}" for number in range(count)]
    processes = [started(folder, recipe, run, name) for name in names]
    each = [finished(process, folder / name) for process, name in zip(processes, names, strict=True)]
    return {way: sum(one[way] for one in each) / count for way in MEASURES}


def started(folder: Path, recipe: Path, run: Run, name: str) -> "subprocess.Popen[str]":
    """`clm-dist train`, launched as its engine needs it."""
    batch = run.processes * run.micro_batch * run.micro_steps
    words = ["-m", "clm_dist", "train", str(recipe), "--overwrite", f"run_dir={folder / name}"]
    words += [f"train.micro_batch_size={run.micro_batch}", f"train.global_batch_size={batch}"]
    if run.processes > 1 or run.engine != "ddp":
        words = [*launcher(run.engine, run.processes), *words]
    return process([sys.executable, *words])


def finished(process: "subprocess.Popen[str]", run: Path) -> dict[str, float]:
    """What it wrote of its steps, when it is done."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run failed:\n{said[-3000:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["perf/seconds_per_step"] for row in rows if "perf/seconds_per_step" in row][FIRST:]
    return {name: way(seconds) for name, way in MEASURES.items()}


def launcher(engine: str, processes: int) -> list[str]:
    words = f"-m accelerate.commands.launch --config_file accelerate_configs/{engine}.yaml --num_processes {processes}"
    return [*words.split(), "--main_process_port", "0"]


def process(command: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def ended(command: list[str]) -> None:
    started = process(command)
    _, said = started.communicate()
    if started.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-3000:]}")


def worker(folder: Path, processes: int, what: str, file: str = __file__) -> Any:
    """What launched processes of a file find."""
    launch = launcher("ddp", processes) if processes > 1 else []
    ended([sys.executable, *launch, file, what, str(folder / "found.json")])
    return json.loads((folder / "found.json").read_text())


def collectives(target: Path) -> None:
    """Every rank must call this. Times gloo, and writes bandwidth and latency."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    points: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
    for size in SIZES:
        whole = torch.ones(size // 4 // ranks * ranks)
        part = whole[: whole.numel() // ranks].clone()
        kinds: dict[str, list[Callable[[], Any]]] = {
            "all_reduce": [partial(dist.all_reduce, whole)],
            "passes": [partial(dist.all_gather_into_tensor, whole, part),
                       partial(dist.reduce_scatter_tensor, part, whole)],
        }  # fmt: skip
        for kind, calls in kinds.items():
            points[kind] += [(size, timed(call, dist.barrier)) for call in calls]
    if dist.get_rank() == 0:
        passes = {"all_reduce": 2, "passes": 1}
        found = {
            name: {kind: fitted([(n, way(s)) for n, s in points[kind]], ranks, passes[kind]) for kind in passes}
            for name, way in MEASURES.items()
        }
        target.write_text(json.dumps(found))
    dist.destroy_process_group()


def update(target: Path) -> None:
    """Times clipping and an update of all weights."""
    import torch

    weights = [torch.nn.Parameter(torch.ones(tensor.size)) for tensor in anatomy_of("gpt2", MODEL).tensors]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights)

    def whole() -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    seconds = timed(whole)
    target.write_text(json.dumps({name: way(seconds) for name, way in MEASURES.items()}))


def timed(call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(FIRST + REPEATS):
        before()
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return found[FIRST:]


if __name__ == "__main__":
    {"collectives": collectives, "update": update}[sys.argv[1]](Path(sys.argv[2]))
