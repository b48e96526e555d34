"""Step time on 1 to 1,024 GPUs, on paper: measured time of one GPU, message sizes, stated link speeds (docs/scaling.md).

    python benchmarks/scaling.py [--inputs JSON] [--page docs/scaling.md] [--output FILE]
    python benchmarks/scaling.py --check [--rounds R] [--steps N] [--output FILE]

The first prints the tables, and writes them into the page; inputs are those of benchmarks/scaling.json, each with its
source. The second asks how good such a prediction is: of two and three processes of this machine, from one process and the
speed of gloo, against runs of `clm-dist train` (scaling_check.py). It needs no GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, facts, table
from scaling_model import Anatomy, Compute, Fabric, Link, Tensor, split, step_seconds

from clm_dist.config import ModelConfig
from clm_dist.planning.memory import STRATEGIES

INPUTS = ROOT / "benchmarks" / "scaling.json"
BEGIN, END = "<!-- written by benchmarks/scaling.py -->\n", "<!-- until here -->\n"
GPUS = [2**power for power in range(11)]
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES if not strategy.offload_optimizer}
TITLES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
WAYS: dict[str, dict[str, Any]] = {  # what to change, and how the step then differs from the measured one
    "as measured": {},
    "4 x the micro-batch": {"times": 4},
    "16 micro-steps": {"micro_steps": 16},
    "large buckets, `overlap_comm`": {"bucket": 50_000_000},  # of ZeRO-1 and 2; 200 MB in fp32
    "if a GPU were 3 x as fast": {"faster": 3},
}


@dataclass(frozen=True)
class Case:
    """A model under an engine, as one GPU was measured with it."""

    model: str
    anatomy: Anatomy
    engine: str
    compute: Compute
    sequences: int  # of a micro-batch
    block: int
    own: bool  # False: this engine was not measured with this model, the time is that of DDP

    def step(self, gpus: int, fabric: Fabric, times: float = 1, faster: float = 1, **further: Any) -> float:
        """Seconds, with so many times the measured micro-batch, on a GPU that computes so many times as fast."""
        compute = self.compute.with_micro_batch(times / faster)
        return step_seconds(self.anatomy, BY_NAME[self.engine], gpus, compute, fabric, **further)


@dataclass(frozen=True)
class Point:
    """A prediction."""

    seconds: float  # of a step
    tokens_per_second: float  # of all GPUs
    efficiency: float  # of so many times the speed of one GPU


def weak(case: Case, gpus: int, fabric: Fabric, **way: Any) -> Point:
    """Every GPU keeps its batch: the global batch grows with them. way: of WAYS."""
    seconds = case.step(gpus, fabric, **way)
    tokens = gpus * way.get("micro_steps", 1) * way.get("times", 1) * case.sequences * case.block
    return Point(seconds, tokens / seconds, case.step(1, fabric, **way) / seconds)


def strong(case: Case, gpus: int, fabric: Fabric, tokens: int) -> Point | None:
    """The global batch of so many tokens stays, GPUs share it: first fewer micro-steps, then smaller ones."""
    each = tokens // case.block // gpus
    if not each:
        return None
    micro_batch = min(case.sequences, each)
    seconds = case.step(gpus, fabric, micro_batch / case.sequences, micro_steps=each // micro_batch)
    alone = case.step(1, fabric, micro_steps=tokens // case.block // case.sequences)
    return Point(seconds, tokens / seconds, alone / (gpus * seconds))


def reach(point: Callable[[int], Point | None], bound: float) -> int:
    """The most GPUs up to which efficiency is never below the bound."""
    most = 1
    for gpus in GPUS:
        found = point(gpus)
        if found is None or found.efficiency < bound:
            break
        most = gpus
    return most


def fabrics(inputs: dict[str, Any]) -> dict[str, Fabric]:
    """By the name of the network."""

    def link(one: dict[str, Any]) -> Link:
        return Link(one["bandwidth"] * one["efficiency"], one["latency_us"] / 1e6)

    node, launch = inputs["node"], inputs["launch_us"] / 1e6
    return {name: Fabric(link(node), link(one), node["gpus"], launch) for name, one in inputs["networks"].items()}


def cases(inputs: dict[str, Any]) -> Iterator[Case]:
    """Every measured model under every engine; the time of DDP stands in where an engine was not measured."""
    memory = inputs["memory"]["bandwidth"] * inputs["memory"]["efficiency"]
    found = {(row["model"], row["engine"]): row for row in inputs["measured"]}
    for name, model in inputs["models"].items():
        anatomy = anatomy_of(model["type"], inputs["tokenizer"] | model["config"])
        for engine in BY_NAME:
            row = found.get((name, engine), found[name, "ddp"])
            seconds = model["block"] * model["sequences"] / row["tokens_per_second"]
            compute = split(seconds, anatomy.parameters, memory, row["checkpointing"])
            yield Case(name, anatomy, engine, compute, model["sequences"], model["block"], row["engine"] == engine)


def anatomy_of(kind: str, config: dict[str, Any]) -> Anatomy:
    """The tensors of a model from random weights; none is made."""
    import torch

    from clm_dist.model.build import outline
    from clm_dist.model.configuration import model_configuration
    from clm_dist.planning.shapes import hidden_size

    asked = ModelConfig(type=kind, config=config)
    built = model_configuration(asked, {})
    with torch.device("meta"):
        model = outline(asked, built, torch.float32)
    looked_up = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    layers = [one for one in model.modules() if type(one).__name__ in model._no_split_modules]
    block = {id(weight): number for number, layer in enumerate(layers) for weight in layer.parameters()}
    tensors = tuple(
        Tensor(one.numel(), 0 if id(one) in looked_up else one.numel(), block.get(id(one), -1))
        for one in model.parameters()
        if one.requires_grad
    )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return Anatomy(tensors, embedding.numel() if head is embedding else 0, hidden_size(built) or 0)


def tables(inputs: dict[str, Any]) -> str:
    """All that the page shows: limits first, then every model."""
    everything, ways = list(cases(inputs)), fabrics(inputs)
    text = sizes(everything)
    text += limits(everything, ways, inputs["bound"], inputs["strong_tokens"])
    shown = [case for case in everything if case.engine in ("ddp", "zero3")]
    for model in inputs["models"]:
        columns = [(case, name) for name in ways for case in shown if case.model == model]
        each, tokens = columns[0][0], inputs["strong_tokens"]
        points: dict[str, Callable[..., Point | None]] = {
            f"{model}: each GPU {each.sequences} x {each.block:,} tokens": weak,
            f"{model}: {tokens:,} tokens a step in all": partial(strong, tokens=tokens),
        }
        head = " | ".join(["GPUs", *(f"{titled(case)}, {name}" for case, name in columns)])
        for title, point in points.items():
            rows = {gpus: [point(case, gpus, fabric=ways[name]) for case, name in columns] for gpus in GPUS}
            lines = [[f"{gpus:,}", *map(shown_as, row)] for gpus, row in rows.items() if all(row)]
            text += table(title, head, lines)
    return text.replace("\n## ", "\n### ")  # they stand under a title of the page


def limits(everything: list[Case], ways: dict[str, Fabric], bound: float, tokens: int) -> str:
    """How far each case scales, on each network."""
    rows = []
    for case in everything:
        points = [partial(weak, case, **way) for way in WAYS.values()] + [partial(strong, case, tokens=tokens)]
        reached = ([reach(partial(point, fabric=fabric), bound) for fabric in ways.values()] for point in points)
        rows.append([case.model, titled(case), *(" / ".join(map(up_to, each)) for each in reached)])
    title = f"GPUs up to which efficiency stays at {bound:.0%}: {' / '.join(ways)}"
    return table(title, " | ".join(["model", "engine", *WAYS, f"{tokens:,} tokens in all"]), rows)


def sizes(everything: list[Case]) -> str:
    """What was measured, and what one step then consists of."""
    rows = [
        [case.model, titled(case), f"{case.anatomy.parameters:,}", f"{case.sequences} x {case.block:,}",
         *(f"{1e3 * one:.1f}" for one in (case.compute.forward, case.compute.backward, case.compute.update))]
        for case in everything if case.own
    ]  # fmt: skip
    head = "model | engine | parameters | tokens of a micro-batch | forward, ms | backward, ms | update, ms"
    return table("One GPU, as measured and divided", head, rows)


def titled(case: Case) -> str:
    return TITLES[case.engine] + ("" if case.own else "*")


def up_to(gpus: int) -> str:
    return f"{gpus:,}+" if gpus == GPUS[-1] else f"{gpus:,}"


def shown_as(point: Point | None) -> str:
    return (
        ""
        if point is None
        else f"{1e3 * point.seconds:,.1f} ms, {point.tokens_per_second / 1e3:,.0f} k/s, {point.efficiency:.0%}"
    )


def between_markers(page: str, text: str) -> str:
    """The page with other tables."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"the page needs the two lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + text + "\n" + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=INPUTS, metavar="JSON", help="measured times and link speeds")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are written anew")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: tables, command, versions")
    parser.add_argument("--check", action="store_true", help="predict and measure two and three processes here")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="of --check, in which all take turns (5)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="of each run of --check (30)")
    asked = parser.parse_args()
    if asked.check:
        from scaling_check import check

        text = check(asked.rounds, asked.steps)
    else:
        text = tables(json.loads(asked.inputs.read_text()))
    print(text)
    if asked.page:
        asked.page.write_text(between_markers(asked.page.read_text(), text))
    if asked.output:
        title = "Scaling: predicted and measured on this machine" if asked.check else "Scaling on paper"
        command = f"benchmarks/scaling.py {' '.join(sys.argv[1:])}"
        asked.output.write_text(f"# {title}\n\n{facts(command)}\n{text}")


if __name__ == "__main__":
    main()
