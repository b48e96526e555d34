"""Every engine, precision and estimate on one GPU: what is tested on CPUs, on the hardware it is meant for.

    python benchmarks/gpu.py [--parts engines precision resume check memory job] [--output FILE]

Each run is a command as a user gives it (`accelerate launch --config_file ... -m clm_dist train`) on real ELI5 answers, with
one process. Those that are not timed share the GPU, six at a time. A run that fails is a row of the table, with the last
line that it printed. Without a GPU the same commands run on the CPU (`--tiny`: models that it can train).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, facts, real_data
from transformers import AutoModelForCausalLM  # here, for threads that import it at once get half of a module

ENGINES = ["plain", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2"]  # accelerate_configs/
PATIENCE = 240  # seconds for one command
TOGETHER = 6  # commands that are not timed
GIB = 2**30
LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "max_position_embeddings": 4096}
MODELS = {  # name: (type, config, block size, sequences a step)
    "DistilGPT2": ("gpt2", {"n_layer": 6}, 1024, 8),
    "GPT-2": ("gpt2", {}, 1024, 8),
    "GPT-2 medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}, 1024, 8),
    "LLaMA 1B": ("llama", LLAMA, 4096, 2),
}
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


class Bench:
    """The folder of a series of runs; its recipes, and the commands on them."""

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny, self.preparing = folder, tiny, threading.Lock()
        data = real_data()
        self.source, self.tokenizer = data / "eli5_category/eli5-category-test.json.gz", data / "distilgpt2"

    def recipe(self, name: str, model: str, **sections: dict[str, Any]) -> Path:
        """The recipe of one run of a model of MODELS, and further settings; one optimizer step a log line."""
        kind, config, block, batch = MODELS[model]
        if self.tiny:
            block, config = 64, {**config, "n_layer": 2, "n_embd": 32, "n_head": 2} if kind == "gpt2" else config
        config = {**config, "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256}
        dropout = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0) if kind == "gpt2" else {}
        data = {"source": str(self.source), "text_column": "answers.text", "tokenizer": str(self.tokenizer)}
        data |= {
            "eval_fraction": 0.002 if self.tiny else 0.05,
            "block_size": block,
            "prepared_dir": str(self.folder / f"blocks{block}"),
        }
        recipe = {
            "run_dir": str(self.folder / name),
            "data": data,
            "model": {"type": kind, "config": {**config, **dropout}},
            "optim": {"lr": 3e-4, "warmup_steps": 5},
            "train": {"max_steps": 30, "global_batch_size": batch, "log_every": 1, "mixed_precision": "no"},
            "generate": {"prompts": ["The sky is blue because"], "max_new_tokens": 20},
        }
        for section, values in sections.items():
            recipe[section] = {**recipe.get(section, {}), **values}
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(recipe))
        with self.preparing:
            if not (Path(data["prepared_dir"]) / "train").exists():
                self.clm_dist("prepare", path)
        return path

    def clm_dist(self, command: str, recipe: Path, *further: str, engine: str = "plain") -> str:
        """`clm-dist COMMAND RECIPE ...` with an engine; returns what it printed on stdout. Raises RuntimeError."""
        words = ["-m", "clm_dist", command, str(recipe), *further]
        if engine != "plain":
            config = f"accelerate_configs/{engine}.yaml"
            words = ["-m", "accelerate.commands.launch", "--config_file", config, *PORT, *words]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "4", "PYTHONPATH": path_of_python()}
        try:
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {PATIENCE} s") from None
        (self.folder / f"{recipe.stem}.{command}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {last_line(done.stderr)}")
        return done.stdout

    def rows(self, recipe: Path, kind: str = "train/loss") -> list[dict[str, float]]:
        """The metrics of a run that hold a figure."""
        run = Path(json.loads(recipe.read_text())["run_dir"])
        return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if kind in row]

    def weights(self, recipe: Path) -> str:
        """SHA-256 of the exported weights, which plain transformers must be able to load."""
        folder = Path(json.loads(recipe.read_text())["run_dir"]) / "model"
        AutoModelForCausalLM.from_pretrained(folder)
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


PORT = ["--num_processes", "1", "--main_process_port", "0"]


def path_of_python() -> str:
    """Processes are started in ROOT, but what else this one imports from is theirs too."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def last_line(text: str) -> str:
    """Of what went wrong: the last line with an error's name, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing was printed"]
    return next((line for line in reversed(lines) if "Error" in line or line.startswith("clm-dist:")), lines[-1])[:300]


def table(title: str, head: str, rows: Iterable[list[str]]) -> str:
    """A Markdown table under a title."""
    columns = [cell.strip() for cell in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def together(cases: list[Any], run: Callable[[Any], list[str]], at_once: int = TOGETHER) -> list[list[str]]:
    """The row of each case; one that fails has its message in the place of figures."""

    def guarded(case: Any) -> list[str]:
        begin = time.monotonic()
        try:
            row = run(case)
        except Exception as error:  # a failure is a result
            row = [" ".join(map(str, case)) if isinstance(case, tuple) else str(case), f"FAILED: {error}"]
        print(f"{time.monotonic() - begin:6.1f} s  {row}", flush=True)
        return row

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(guarded, cases))


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
    cases = [(engine, how) for engine in ("ddp", "zero2", "zero3", "fsdp2") for how in ("bf16", "no")]

    def run(case: tuple[str, str]) -> list[str]:
        engine, how = case
        train, saved = {"mixed_precision": how, "max_steps": 20}, {"save_every": 10}
        straight = bench.recipe(f"straight-{engine}-{how}", "DistilGPT2", train=train, checkpoint=saved)
        bench.clm_dist("train", straight, engine=engine)
        checkpoint = sorted((bench.folder / straight.stem / "checkpoints").glob("*10"))[0]
        again = bench.recipe(f"again-{engine}-{how}", "DistilGPT2", train={**train, "resume": str(checkpoint)})
        bench.clm_dist("train", again, engine=engine)
        losses = [[row["train/loss"] for row in bench.rows(one)][-10:] for one in (straight, again)]
        same = bench.weights(straight) == bench.weights(again)
        return [engine, how, str(losses[0] == losses[1]), str(same)]

    head = "engine | mixed_precision | losses of steps 11 to 20 equal | weights equal, byte for byte"
    return table("Resumed", head, together(cases, run))


def check(bench: Bench) -> str:
    """`clm-dist check` of one recipe under every engine."""
    cases = [(engine, how) for engine in ("ddp", "zero2", "zero3", "fsdp2") for how in ("no", "bf16")]

    def run(case: tuple[str, str]) -> list[str]:
        engine, how = case
        recipe = bench.recipe(
            f"check-{engine}-{how}", "DistilGPT2", train={"mixed_precision": how, "micro_batch_size": 4}
        )
        told = bench.clm_dist("check", recipe, engine=engine).strip().splitlines()
        return [engine, how, told[-1]]

    return table("`clm-dist check`", "engine | mixed_precision | last line", together(cases, run))


def memory(bench: Bench) -> str:
    """What `plan` says of a GPU's memory against what the allocator held at most; speed, one run at a time."""
    recipes = {}
    for case in MEMORY:
        model, _, checkpointing, deterministic = case
        train = {"mixed_precision": "bf16", "max_steps": 25, "deterministic": deterministic}
        train["activation_checkpointing"] = checkpointing
        recipes[case] = bench.recipe("-".join(map(str, case)).replace(" ", "_"), model, train=train)
    with ThreadPoolExecutor() as pool:
        further = ["--gpus", "1", "--gpu-memory", "80", "--json"]
        planned = dict(
            zip(
                MEMORY,
                pool.map(lambda case: json.loads(bench.clm_dist("plan", recipes[case], *further)), MEMORY),
                strict=True,
            )
        )

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
    import torch

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
    parser.add_argument("--output", type=Path, help="Markdown file")
    parser.add_argument("--keep", type=Path, help="folder for the runs, instead of a temporary one")
    parser.add_argument("--tiny", action="store_true", help="small models and blocks, to try the script on a CPU")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        bench = Bench(asked.keep or Path(folder), asked.tiny)
        bench.folder.mkdir(parents=True, exist_ok=True)
        text = f"# One GPU\n\n{facts('benchmarks/gpu.py --parts ' + ' '.join(asked.parts))}\n{device()}\n"
        for part in asked.parts:
            text += PARTS[part](bench)
            print(text.rpartition("\n## ")[2], flush=True)
            if asked.output:
                asked.output.write_text(text)


if __name__ == "__main__":
    main()
