"""One training process of ours and of three peers, in turns: tokens/s, memory, MFU; a Markdown table.

    python benchmarks/speed.py [--cases NAME ...] [--sides NAME ...] [--without KEY=VALUE ...] [--repeats R] [--output FILE]

The same random weights of the same shape, the same blocks of the ELI5 sample in the same order, the same AdamW, no dropout.
Sides (peers.py): `clm-dist train`, the guide's Trainer script, the no-trainer loop of the public Accelerate example, and a
loop written by hand in plain torch (on a GPU compiled, as nanoGPT does), which is about what the machine can do. Each is a
process of its own. A case that fails is a row of the table. Without a GPU cases for a CPU run, with two threads.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import ROOT, cell, facts

WORDS = 2048  # of the sample's tokenizer; a model may have more
LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "max_position_embeddings": 4096}
GPT2 = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SMALL = {**GPT2, "n_layer": 4, "n_embd": 128, "n_head": 4}


def case(kind: str, config: dict, vocabulary: int, block: int, batch: int, steps: int, **train: object) -> dict:
    """One thing to measure. steps: the first fifth of them is not timed."""
    further = {} if kind != "gpt2" else {"n_positions": block}
    return {
        "type": kind, "config": {**config, **further, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0},
        "block": block, "batch": batch, "steps": steps, "train": {"mixed_precision": "no", **train},
    }  # fmt: skip


ON_CPU = {
    "small, vocabulary 2,048": case("gpt2", SMALL, 2048, 128, 16, 50),
    "small, vocabulary 50,257": case("gpt2", SMALL, 50257, 128, 16, 20),
    "DistilGPT2, block 128": case("gpt2", {**GPT2, "n_layer": 6}, 50257, 128, 8, 5),
    "DistilGPT2, block 1,024": case("gpt2", {**GPT2, "n_layer": 6}, 50257, 1024, 8, 2),
    "DistilGPT2, block 1,024, checkpointing": case(
        "gpt2", {**GPT2, "n_layer": 6}, 50257, 1024, 8, 2, activation_checkpointing=True
    ),
}
BF16 = {"mixed_precision": "bf16"}
FLAGS = Path("/proc/cpuinfo")
if FLAGS.exists() and {"avx512_bf16", "amx_bf16"} & set(FLAGS.read_text().split()):  # others take some 50 times as long
    ON_CPU["DistilGPT2, block 128, bf16"] = case("gpt2", {**GPT2, "n_layer": 6}, 50257, 128, 8, 5, **BF16)
ON_GPU = {
    "DistilGPT2, 8 x 1,024": case("gpt2", {**GPT2, "n_layer": 6}, 50257, 1024, 8, 100, **BF16),
    "DistilGPT2, 32 x 1,024": case("gpt2", {**GPT2, "n_layer": 6}, 50257, 1024, 32, 50, **BF16),
    "GPT-2, 8 x 1,024": case("gpt2", GPT2, 50257, 1024, 8, 100, **BF16),
    "GPT-2, 32 x 1,024": case("gpt2", GPT2, 50257, 1024, 32, 50, **BF16),
    "GPT-2 XL, 4 x 1,024": case(
        "gpt2", {**GPT2, "n_layer": 48, "n_embd": 1600, "n_head": 25}, 50257, 1024, 4, 20, **BF16
    ),
    "LLaMA 1 B, 2 x 4,096": case("llama", LLAMA, 50257, 4096, 2, 25, **BF16),
}
SIDES = ["clm-dist", "Trainer", "no-trainer", "minimal"]


def recipe(name: str, made: dict, folder: Path) -> Path:
    """Ours, written down; its blocks are the peers' too."""
    every = max(1, made["steps"] // 5)
    data = {"source": str(ROOT / "recipes/eli5_sample.jsonl"), "text_column": "answers.text", "eval_fraction": 0}
    data |= {
        "tokenizer_vocab_size": WORDS,
        "block_size": made["block"],
        "prepared_dir": str(folder / f"b{made['block']}"),
    }
    train = {"max_steps": made["steps"], "global_batch_size": made["batch"], "log_every": every, **made["train"]}
    whole = {
        "run_dir": str(folder / name.replace(" ", "_")), "data": data, "train": train, "optim": {"lr": 3e-4},
        "model": {"type": made["type"], "config": made["config"], "check_causality": False},
        "checkpoint": {"save_every": 10**6},
    }  # fmt: skip
    path = folder / f"{name.replace(' ', '_')}.json"
    path.write_text(json.dumps(whole))
    if not Path(data["prepared_dir"]).exists():
        execute([sys.executable, "-m", "clm_dist", "prepare", path])
    return path


def execute(command: list) -> str:
    """Runs it; RuntimeError with its last line where it fails."""
    threads = str(min(8, os.cpu_count() or 1))
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1][:200] if lines else f"exit code {done.returncode}")
    return done.stdout


def ours(path: str, *overrides: str) -> dict[str, float]:
    """`clm-dist train`, and its own figures. overrides: what is taken away, to see what it was worth."""
    from clm_dist import cli

    if code := cli.main(["train", path, *overrides, "--overwrite"]):
        sys.exit(code)
    import torch

    metrics = Path(json.loads(Path(path).read_text())["run_dir"]) / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    tokens, seconds = (rows[-1][key] - rows[0][key] for key in ("train/tokens_seen", "time"))
    figures = {"tokens/s": tokens / seconds, "loss": rows[-1]["train/loss"]}
    return figures | ({"memory": rows[-1]["perf/peak_memory_gib"]} if torch.cuda.is_available() else {})


def work(side: str, path: str, output: str) -> None:
    """One process: measures, and leaves."""
    began = time.perf_counter()
    if side.startswith("clm-dist"):
        found = ours(path, *side.split()[1:])
    else:
        import peers

        found = getattr(peers, side.replace("-", "_").lower())(json.loads(Path(path).read_text()))
    import torch

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found.setdefault("memory", (peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30)
    Path(output).write_text(json.dumps({**found, "seconds": time.perf_counter() - began}))
    sys.stdout.flush()
    os._exit(0)


def measure(name: str, made: dict, sides: list[str], repeats: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """side: figure: its values."""
    path, found = recipe(name, made, folder), {side: defaultdict(list) for side in sides}
    for side in sides * repeats:
        try:
            execute([sys.executable, __file__, "worker", side, path, folder / "out.json"])
        except RuntimeError as error:
            found[side]["failed"].append(str(error))
            print(f"{name} {side} FAILED: {error}", file=sys.stderr, flush=True)
            continue
        values = json.loads((folder / "out.json").read_text())
        print(f"{name} {side} {values}", file=sys.stderr, flush=True)
        for figure, value in values.items():
            found[side][figure].append(value)
    return found


def table(name: str, made: dict, found: dict) -> str:
    """One case."""
    import torch

    from clm_dist.training.meter import peak_flops

    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    head = ["", "tokens/s", "of ours", "peak memory, GiB", "of ours", "MFU", "loss at the end"]
    text = f"\n## {name}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n"
    base = found.get("clm-dist", {})
    for side, figures in found.items():
        if "tokens/s" not in figures:
            text += f"| {side} | FAILED: {figures['failed'][0]} | | | | | |\n"
            continue
        speed, memory = figures["tokens/s"], figures["memory"]
        ratios = [f"{median(one) / median(base[key]):.2f}" if key in base else "" for one, key in
                  ((speed, "tokens/s"), (memory, "memory"))]  # fmt: skip
        mfu = f"{median(speed) * flops(made) / peak:.1%}" if peak else ""
        text += f"| {side} | {cell(speed, ',.0f')} | {ratios[0]} | {cell(memory, '.2f')} | {ratios[1]} | {mfu} | "
        text += f"{median(figures['loss']):.4f} |\n"
    return text


def flops(made: dict) -> float:
    """Operations a token, as PaLM counts them (arXiv:2204.02311, appendix B)."""
    from clm_dist.config import ModelConfig
    from clm_dist.model.configuration import model_configuration
    from clm_dist.planning.estimate import flops_per_token
    from clm_dist.planning.shapes import shapes

    config = ModelConfig(type=made["type"], config=made["config"])
    return flops_per_token(shapes(config, model_configuration(config, {})), made["block"], checkpointing=False)


def main() -> None:
    import torch

    cases = ON_GPU if torch.cuda.is_available() else ON_CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="KEY=VALUE", help="ours again, each with one override"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case begins later than this")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: tables, command, versions, hardware")
    args = parser.parse_args()
    began, where = time.monotonic(), torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = f"# Speed and memory beside peers, {where}\n\n{facts(shlex.join(['benchmarks/speed.py', *sys.argv[1:]]))}\n"
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            if time.monotonic() - began > args.seconds:
                break
            found = measure(
                name,
                cases[name],
                [*args.sides, *(f"clm-dist {one}" for one in args.without)],
                args.repeats,
                Path(folder),
            )
            text += table(name, cases[name], found)
            if args.output:
                args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main()
