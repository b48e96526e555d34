"""Every engine, precision and estimate on one GPU: what is tested on CPUs, on the hardware it is meant for.

    python benchmarks/gpu.py [--parts engines precision resume check memory job] [--engines plain ddp ...] [--output FILE]

Each run is a command as a user gives it (`accelerate launch --config_file ... -m clm_dist train`) on real ELI5 answers, with
one process. Those that are not timed share the GPU, six at a time. A run that fails is a row of the table, with the last
line that it printed. Without a GPU the same commands run on the CPU (`--tiny`: models that it can train).
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median

import torch
from common import facts, table
from launched import Bench, together

ENGINES = ["plain", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2"]  # accelerate_configs/
GIB = 2**30
SAID = {"compiled blocks": "blocks are compiled", "CUDA graph": "one CUDA graph"}  # by a run that uses them
WAYS = list(product(("plain", "ddp", "zero2", "zero3", "fsdp2"), ("no", "bf16")))  # engine, mixed_precision
MEMORY = [  # model, engine, activation checkpointing, deterministic kernels
    ("DistilGPT2", "plain", False, True),
    ("GPT-2", "plain", False, True),
    ("GPT-2", "plain", False, False),
    ("GPT-2 medium", "ddp", False, True),
    ("GPT-2 medium", "ddp", True, True),
    ("GPT-2 medium", "zero2", False, True),
    ("GPT-2 medium", "zero3", True, True),
    ("GPT-2 medium", "zero2_offload", False, True),
    ("GPT-2 medium", "fsdp2", False, True),
    ("LLaMA 1B", "ddp", True, True),
    ("LLaMA 1B", "fsdp2", False, True),
    ("LLaMA 1B", "fsdp2", False, False),
]


def engines(bench: Bench) -> str:
    """The same losses in fp32 from every engine, and weights that plain transformers loads."""
    recipes = {one: bench.recipe(f"engine-{one}", "DistilGPT2", train={"micro_batch_size": 4}) for one in ENGINES}

    def run(engine: str) -> list[str]:
        bench.clm_dist("train", recipes[engine], engine=engine)
        losses = [row["train/loss"] for row in bench.rows(recipes[engine])]
        evaluation = bench.rows(recipes[engine], "eval/loss")[-1]["eval/loss"]
        return [engine, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{evaluation:.7f}", bench.weights(recipes[engine])]

    rows, reference = together(ENGINES, run), None
    for row in rows:
        if not row[1].startswith("FAILED"):
            losses = [one["train/loss"] for one in bench.rows(recipes[row[0]])]
            reference = reference or losses
            row.append(f"{max(abs(a - b) for a, b in zip(losses, reference, strict=True)):.1e}")
    head = (
        "engine | loss, step 1 | step 30 | evaluation | weights, SHA-256 | a step's loss from the first row's, at most"
    )
    return table("Engines: DistilGPT2's shape, fp32, 2 micro-steps of 4 x 1,024 tokens", head, rows)


def precision(bench: Bench) -> str:
    """bf16, fp16 and fp8 beside fp32."""
    cases = [("ddp", "no"), ("ddp", "bf16"), ("ddp", "fp16"), ("ddp", "fp8"), ("ddp", "auto")]
    cases += [(engine, how) for engine in ("zero2", "zero3", "fsdp2") for how in ("bf16", "fp16")]

    def run(case: tuple[str, str]) -> list[str]:
        engine, how = case
        train = {"mixed_precision": how, "max_steps": 60}
        recipe = bench.recipe(f"precision-{engine}-{how}", "DistilGPT2", train=train)
        bench.clm_dist("train", recipe, engine=engine)
        rows, evaluation = bench.rows(recipe), bench.rows(recipe, "eval/loss")[-1]
        last = median(row["train/loss"] for row in rows[-10:])
        return [engine, how, f"{rows[0]['train/loss']:.4f}", f"{last:.4f}", f"{evaluation['eval/loss']:.4f}"]

    head = "engine | mixed_precision | loss, step 1 | median of the last ten | evaluation"
    return table("Precisions: DistilGPT2's shape, 60 steps of 8 x 1,024 tokens", head, together(cases, run))


def resume(bench: Bench) -> str:
    """Twenty steps, and the last ten of them again from the checkpoint of step 10."""

    def run(case: tuple[str, str]) -> list[str]:
        engine, how = case
        train, saved = {"mixed_precision": how, "max_steps": 20}, {"save_every": 10}
        straight = bench.recipe(f"straight-{engine}-{how}", "DistilGPT2", train=train, checkpoint=saved)
        told = bench.clm_dist("train", straight, engine=engine)
        checkpoint = sorted((bench.folder / straight.stem / "checkpoints").glob("*10"))[0]
        again = bench.recipe(f"again-{engine}-{how}", "DistilGPT2", train={**train, "resume": str(checkpoint)})
        bench.clm_dist("train", again, engine=engine)
        losses = [[row["train/loss"] for row in bench.rows(one)][-10:] for one in (straight, again)]
        same = bench.weights(straight) == bench.weights(again)
        parts = [what for what, line in SAID.items() if line in told]
        return [engine, how, ", ".join(parts) or "neither", str(losses[0] == losses[1]), str(same)]

    head = "engine | mixed_precision | in use | losses of steps 11 to 20 equal | weights equal, byte for byte"
    return table("Resumed", head, together(bench.ways, run))


def check(bench: Bench) -> str:
    """`clm-dist check` of one recipe under every engine."""

    def run(case: tuple[str, str]) -> list[str]:
        engine, how = case
        recipe = bench.recipe(
            f"check-{engine}-{how}", "DistilGPT2", train={"mixed_precision": how, "micro_batch_size": 4}
        )
        told = bench.clm_dist("check", recipe, engine=engine).strip().splitlines()
        return [engine, how, told[-1]]

    return table("`clm-dist check`", "engine | mixed_precision | last line", together(bench.ways, run))


def memory(bench: Bench) -> str:
    """What `plan` says of a GPU's memory against what the allocator held at most; speed, one run at a time."""
    recipes, further = {}, ["--gpus", "1", "--gpu-memory", "80", "--json"]
    for case in MEMORY:
        model, _, checkpointing, deterministic = case
        train = {"mixed_precision": "bf16", "max_steps": 25, "deterministic": deterministic}
        train["activation_checkpointing"] = checkpointing
        recipes[case] = bench.recipe("-".join(map(str, case)).replace(" ", "_"), model, train=train)
    with ThreadPoolExecutor() as pool:
        printed = pool.map(lambda case: bench.clm_dist("plan", recipes[case], *further), MEMORY)
        planned = dict(zip(MEMORY, map(json.loads, printed), strict=True))

    def run(case: tuple[str, str, bool, bool]) -> list[str]:
        model, engine, checkpointing, deterministic = case
        way = ("ddp" if engine == "plain" else engine, checkpointing)
        found = (row for row in planned[case]["rows"] if (row["strategy"], row["activation_checkpointing"]) == way)
        expected = next(found)["total"] / GIB
        bench.clm_dist("train", recipes[case], engine=engine)
        rows = bench.rows(recipes[case])
        shutil.rmtree(bench.folder / recipes[case].stem)  # a checkpoint of 1 B is 14 GB
        peak, fast = max(row["perf/peak_memory_gib"] for row in rows), rows[len(rows) // 2 :]
        speed, mfu = (median(row.get(f"perf/{name}", 0) for row in fast) for name in ("tokens_per_second", "mfu"))
        figures = [f"{expected:.2f}", f"{peak:.2f}", f"{expected / peak - 1:+.1%}", f"{speed:,.0f}", f"{mfu:.1%}"]
        return [model, engine, str(checkpointing), str(deterministic), *figures]

    head = "model | engine | checkpointing | deterministic | plan, GiB | allocator's peak, GiB | difference | tokens/s | MFU"
    return table("Memory and speed, bf16", head, together(MEMORY, run, at_once=1))


def job(bench: Bench) -> str:
    """The guide's job from scratch: DistilGPT2's shape on ELI5 until the evaluation loss no longer falls."""
    train = {"mixed_precision": "auto", "global_batch_size": 32, "max_steps": None, "epochs": 8, "log_every": 20}
    optim = {"lr": 6e-4, "schedule": "cosine", "warmup_steps": 40, "weight_decay": 0.1}
    further = {"generate": {"max_new_tokens": 60}}
    recipe = bench.recipe("job", "DistilGPT2", train=train, optim=optim, **further)
    begin = time.monotonic()
    bench.clm_dist("train", recipe, engine="ddp")
    seconds = time.monotonic() - begin
    rows = [[str(int(row["step"])), f"{row['eval/perplexity']:.2f}"] for row in bench.rows(recipe, "eval/loss")]
    title = f"The guide's job from scratch: 8 epochs of ELI5 in {seconds:.0f} s, start and end included"
    return table(title, "step | perplexity", rows)


def device() -> str:
    """The GPU, and the libraries that matter to it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{name}; CUDA {torch.version.cuda}, DeepSpeed {find_version('deepspeed')}, torchao {find_version('torchao')}."
    )


def find_version(package: str) -> str:
    """Of an optional package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


PARTS = {one.__name__: one for one in (engines, precision, resume, check, memory, job)}


def main() -> None:
    """Runs the parts; prints and writes each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--engines", nargs="+", help="of resume and check; all by default")
    parser.add_argument("--output", type=Path, help="Markdown file")
    parser.add_argument("--keep", type=Path, help="folder for the runs, instead of a temporary one")
    parser.add_argument("--tiny", action="store_true", help="small models and blocks, to try the script on a CPU")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        bench = Bench(asked.keep or Path(folder), asked.tiny)
        bench.folder.mkdir(parents=True, exist_ok=True)
        bench.ways = [way for way in WAYS if way[0] in (asked.engines or ENGINES)]
        text = f"# One GPU\n\n{facts(shlex.join(['benchmarks/gpu.py', *sys.argv[1:]]))}\n{device()}\n"
        for part in asked.parts:
            try:
                text += PARTS[part](bench)
            except RuntimeError as error:  # a command that all of a part needs: a failure is a result
                text += f"\n## {part}\n\nFAILED: {error}\n"
            print(text.rpartition("\n## ")[2], flush=True)
            if asked.output:
                asked.output.write_text(text)


if __name__ == "__main__":
    main()
