"""DDP's exchange by itself: the same launched processes compute with and without it in turns; a part of scaling.py --check.

On a machine that is shared, runs of minutes meet different neighbours. Here computing alone, computing with exchange, and
collectives alone follow each other within a second, so that a prediction from the first and the last is asked about the
exchange and nothing else.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from common import table
from scaling import anatomy_of
from scaling_check import BLOCK, FIRST, MODEL, SIZES, fitted, worker
from scaling_model import Fabric, Link, all_reduce, ddp_buckets, last_arrival

ROUNDS = 40
CASES = [(2, 4), (2, 1), (3, 4), (3, 1)]  # processes, sequences
NOTE = f"""
{ROUNDS} rounds, in each of which everything took its turn, in an order that was drawn: a forward and backward pass of DDP,
without an update. A cell is median (quartiles), times are those of the slowest process. "added", "hidden": predicted as if
nothing of the exchange were hidden behind the backward pass, or all that there is time for.
"""


def alternating(folder: Path) -> str:
    """The table."""
    anatomy, rows = anatomy_of("gpt2", MODEL), []
    messages = ddp_buckets(anatomy)
    for processes, sequences in CASES:
        found = worker(folder, processes, str(sequences), __file__)
        points = [(size, median(found[str(size)])) for size in SIZES]
        link = Link(*fitted(points, processes, 2))
        cost = partial(all_reduce, gpus=processes, fabric=Fabric(link, link, processes))
        ratios = []
        for overlap in (False, True):
            predicted = [
                quiet / 3 + last_arrival(messages, quiet * 2 / 3, cost, overlap) for quiet in found["computing"]
            ]
            ratios.append([one / real for one, real in zip(predicted, found["exchanging"], strict=True)])
        sent = sum(cost(message.size) for message in messages)
        milliseconds = [[1e3 * one for one in found[kind]] for kind in ("computing", "exchanging")]
        rows.append(
            [str(processes), str(sequences), quartiles(milliseconds[0], ".0f"), f"{1e3 * sent:.0f}",
             quartiles(milliseconds[1], ".0f"), *(quartiles(one, ".2f") for one in ratios)]
        )  # fmt: skip
    head = "processes | sequences | computing, ms | exchange, predicted, ms | both, measured, ms"
    head += " | predicted / measured: added | hidden"
    return table("Computing with and without exchange, in turns", head, rows) + NOTE


def quartiles(values: list[float], form: str) -> str:
    """Median (first to third quartile)."""
    low, middle, high = quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def measure(sequences: int, target: Path) -> None:
    """Every rank must call this. Seconds of each kind in each round, those of the slowest rank."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import GPT2Config, GPT2LMHeadModel

    dist.init_process_group("gloo")
    settings = {**MODEL, "bos_token_id": 0, "eos_token_id": 0}
    model = DistributedDataParallel(GPT2LMHeadModel(GPT2Config(**settings)), gradient_as_bucket_view=True)
    ids = torch.randint(MODEL["vocab_size"], (sequences, BLOCK))
    tensors = {size: torch.ones(size // 4) for size in SIZES}

    def exchanging() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def computing() -> None:
        with model.no_sync():
            exchanging()

    kinds: dict[str, Callable[[], Any]] = {"computing": computing, "exchanging": exchanging}
    kinds |= {str(size): partial(dist.all_reduce, tensor) for size, tensor in tensors.items()}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    order = random.Random(0)  # the same on every rank
    for _ in range(FIRST + ROUNDS):
        for name in order.sample(list(kinds), len(kinds)):
            model.zero_grad()
            dist.barrier()
            begin = time.perf_counter()
            kinds[name]()
            found[name].append(time.perf_counter() - begin)
    slowest = torch.tensor([found[name][FIRST:] for name in kinds], dtype=torch.float64)  # (kind, round)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        target.write_text(json.dumps(dict(zip(kinds, slowest.tolist(), strict=True))))
    dist.destroy_process_group()


if __name__ == "__main__":
    measure(int(sys.argv[1]), Path(sys.argv[2]))
