"""Commands of this repository as a user gives them, with any engine, on real ELI5 answers."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, real_data
from transformers import AutoModelForCausalLM  # here, for threads that import it at once get half of a module

PATIENCE = 240  # seconds for one command
TOGETHER = 6  # commands that are not timed
ONE_PROCESS = ["--num_processes", "1", "--main_process_port", "0"]
SAID = re.compile(r"clm-dist \w+: error: |broken: ")  # how our own last words begin
LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "max_position_embeddings": 4096}
MODELS = {  # name: (type, config, block size, sequences a step)
    "DistilGPT2": ("gpt2", {"n_layer": 6}, 1024, 8),
    "GPT-2": ("gpt2", {}, 1024, 8),
    "GPT-2 medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}, 1024, 8),
    "LLaMA 1B": ("llama", LLAMA, 4096, 2),
}


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
            words = ["-m", "accelerate.commands.launch", "--config_file", config, *ONE_PROCESS, *words]
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


def path_of_python() -> str:
    """Processes are started in ROOT, but what else this one imports from is theirs too."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def last_line(text: str) -> str:
    """Of what went wrong: our own words, which the launcher's traceback follows; else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing was printed"]
    return next((line for line in reversed(lines) if SAID.match(line)), lines[-1])[:300]


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
