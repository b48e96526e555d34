"""What single parts of a step are worth on this machine's CPU: each beside what it replaces, in turns; Markdown tables.

    python benchmarks/parts.py [--repeats R] [--output FILE]

The head and the loss of GPT-2's vocabulary at several sizes of chunk; GELU as one operation and as transformers writes it;
AdamW fused and not; DDP's gradients as views of its buckets and not, its graph static and not; the order of blocks a stretch
at a time and step by step. Whole features are taken away by speed.py --without.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import ROOT, cell, facts, table
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import NewGELUActivation

from clm_dist.data import order
from clm_dist.model import chunks
from clm_dist.model.activation import FusedGELU

TOKENS, WIDTH, VOCABULARY = 1024, 768, 50257
SIZES = [2**20, 2**22, 2**24, 2**26]
BUCKETS: dict[str, dict[str, bool]] = {
    "gradients as views of its buckets": {"gradient_as_bucket_view": True},
    "gradients beside its buckets": {},
    "views, static graph": {"gradient_as_bucket_view": True, "static_graph": True},
}
LAUNCH = "accelerate.commands.launch --config_file accelerate_configs/ddp.yaml --num_processes 2 --main_process_port 0"


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each way, the first round left out."""
    found = defaultdict(list)
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                found[name].append(1e3 * (time.perf_counter() - began))
    return found


def head(repeats: int) -> str:
    """Loss and gradients of a head, by chunks of several sizes and from whole logits."""
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH) / 30)
    targets = torch.randint(VOCABULARY, (TOKENS,))

    def by_chunks(size: int) -> None:
        chunks.ELEMENTS_ON_CPU = size
        chunks.summed_nll(hidden, chunks.Output(weight), targets).backward()
        hidden.grad = weight.grad = None

    def whole() -> None:
        F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum").backward()
        hidden.grad = weight.grad = None

    ways = {f"{size // VOCABULARY:,} tokens (2^{size.bit_length() - 1} logits)": size for size in SIZES}
    timed = in_turns({**{name: lambda s=size: by_chunks(s) for name, size in ways.items()}, "whole": whole}, repeats)
    rows = [[name, cell(values, ",.0f")] for name, values in timed.items()]
    return table(f"Head and loss, {TOKENS:,} x {WIDTH}, {VOCABULARY:,} words", "chunk | ms", rows)


def gelu(repeats: int) -> str:
    """Forward and backward of a block's widest tensor, and what autograd keeps for it."""
    x, above = torch.randn(TOKENS, 4 * WIDTH, requires_grad=True), torch.randn(TOKENS, 4 * WIDTH)
    kinds = {"one operation": FusedGELU(NewGELUActivation()), "as transformers writes it": NewGELUActivation()}

    def passes(kind: torch.nn.Module) -> None:
        kind(x).backward(above)
        x.grad = None

    def kept(kind: torch.nn.Module) -> float:
        every: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: every.append(t) or t, lambda t: t):
            kind(x)
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in every}.values()) / 2**20

    timed = in_turns({name: lambda k=kind: passes(k) for name, kind in kinds.items()}, repeats)
    rows = [[name, cell(values, ",.1f"), f"{kept(kinds[name]):.0f}"] for name, values in timed.items()]
    return table(f"GELU by tanh, {TOKENS:,} x {4 * WIDTH:,}", "how | ms | kept for the backward pass, MiB", rows)


def distilgpt2() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=6))


def updates(repeats: int) -> str:
    """One update of DistilGPT2's 82 million weights."""
    model, ways = distilgpt2(), {}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    for kind in ("fused", "foreach", "neither"):
        settings = {"fused": kind == "fused", "foreach": kind == "foreach"}
        ways[kind] = torch.optim.AdamW(model.parameters(), lr=1e-5, **settings).step
    rows = [[name, cell(values, ",.0f")] for name, values in in_turns(ways, repeats).items()]
    return table("AdamW, DistilGPT2", "kind | ms", rows)


def orders(repeats: int) -> str:
    """The blocks of 100 steps of 16 of 1,000."""

    def stretches() -> None:
        order._stretch.cache_clear()
        for step in range(100):
            order.global_batch(step, 16, 1000, 42)

    def steps() -> None:
        for step in range(100):
            positions = np.arange(step * 16, step * 16 + 16, dtype="uint64")
            order.permute(positions % np.uint64(1000), 1000, 42, positions // np.uint64(1000))

    timed = in_turns({f"{order.AHEAD:,} positions": stretches, "each step": steps}, repeats)
    rows = [[name, cell([one / 100 for one in values], ".3f")] for name, values in timed.items()]
    return table("The order of blocks", "permuted together | ms a step", rows)


def buckets(repeats: int) -> str:
    """Two processes, DistilGPT2: what one holds at most, and how long a backward pass of few tokens takes."""
    found = defaultdict(list)
    for _ in range(repeats):
        for kind in BUCKETS:
            command = [sys.executable, "-m", *LAUNCH.split(), __file__, "--worker", kind]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, values in found.items():
        memory, milliseconds = zip(*values, strict=True)
        rows.append([name, cell(memory, ".2f"), cell(milliseconds, ",.0f")])
    return table("DDP, DistilGPT2", "kind | peak memory of a process, GiB | forward and backward, ms", rows)


def worker(kind: str) -> None:
    """A rank of `buckets`."""
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(distilgpt2(), **BUCKETS[kind])
    ids, times = torch.zeros(1, 8, dtype=torch.int64), []
    for _ in range(7):
        began = time.perf_counter()
        model(input_ids=ids).logits.sum().backward()
        times.append(1e3 * (time.perf_counter() - began))
    if torch.distributed.get_rank() == 0:
        print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, median(times[2:])]), flush=True)
    torch.distributed.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: tables, command, versions, hardware")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
    text = "".join(part(args.repeats) for part in (head, gelu, updates, orders, buckets))
    text = f"# Parts of a step, CPU\n\n{facts(f'benchmarks/parts.py --repeats {args.repeats}')}\n{text}"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
