"""What tests share: tiny recipes, prepared data, and ways to run the real commands."""

import copy
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent  # of the environment under test, which need not be on the PATH
SAMPLE = ROOT / "recipes" / "eli5_sample.jsonl"

# A model small enough that a step takes milliseconds; no dropout, so that runs can be compared.
TINY_MODEL = {
    "type": "gpt2",
    "config": {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}


settings.register_profile("no deadline", deadline=None)  # machines are noisy: time is measured in benchmarks only
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items):
    """The file that takes longest goes first: begun last it would keep one worker busy while the other has nothing."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@dataclass(frozen=True)
class Result:
    """A finished command."""

    code: int
    out: str
    err: str


def run_command(
    *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 1200
):
    """`clm-dist ARGUMENTS` as a process of its own."""
    command = [sys.executable, "-m", "clm_dist", *map(str, arguments)]
    return execute(command, cwd=cwd, env=env, timeout=timeout)


def launch(
    processes: int,
    *arguments: str | Path,
    script: Path | None = None,
    env: dict[str, str] | None = None,
    config: str = "ddp",
):
    """The same through `accelerate launch` with so many processes: the users' own way. config: of accelerate_configs/.

    `script` runs instead of `-m clm_dist`.
    """
    program = [str(script)] if script else ["-m", "clm_dist"]
    return execute(launch_command(processes, [*program, *map(str, arguments)], config), env=env)


def launch_command(processes: int, program: list[str], config: str = "ddp") -> list[str]:
    """What starts a program with so many processes: no launcher where there is one, and nothing to share."""
    if processes == 1 and config == "ddp":
        return [sys.executable, *program]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--num_processes", str(processes)]
    return [*launcher, "--main_process_port", "0", *program]


def execute(
    command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 1200
) -> Result:
    """Runs a process to its end, with a clean environment of launcher variables."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # one thread, since the sums inside a matrix product depend on their number
    default = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1"}
    environment = {**inherited, **default, **(env or {})}
    done = subprocess.run(
        command, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def write_documents(path: Path, count: int = 120, seed: int = 0) -> Path:
    """A .jsonl of short texts made of few words: learnable, and different in length."""
    words = [
        "the",
        "cat",
        "dog",
        "bird",
        "tree",
        "house",
        "water",
        "fire",
        "runs",
        "sees",
        "likes",
        "finds",
        "under",
        "over",
        "near",
        "every",
        "small",
        "big",
        "red",
        "blue",
    ]
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = " ".join(draw.choice(words) for _ in range(draw.randint(5, 40))) + "."
            file.write(json.dumps({"text": text}) + "\n")
    return path


def recipe_values(folder: Path, **sections: dict) -> dict:
    """A whole recipe over tiny data in `folder`; keyword arguments are laid over its sections."""
    values = {
        "run_dir": str(folder / "run"),
        "data": {
            "source": str(folder / "texts.jsonl"),
            "prepared_dir": str(folder / "prepared"),
            "eval_fraction": 0.2,
            "tokenizer_vocab_size": 300,
            "block_size": 16,
        },
        "model": copy.deepcopy(TINY_MODEL),  # an override is laid into it
        "optim": {"lr": 1e-2},
        "train": {"max_steps": 6, "global_batch_size": 12, "log_every": 1},
        "evaluate": {"micro_batch_size": 4},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def write_recipe(path: Path, values: dict) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def prepare_recipe(folder: Path, documents: int, **sections: dict) -> Path:
    """A recipe over so many short documents, which are prepared; keyword arguments as for `recipe_values`.

    Prepared in this process: it is what a test begins with, not what it tests, and a process of its own costs seconds.
    """
    from clm_dist.preparation.prepare import prepare
    from clm_dist.recipe import load

    write_documents(folder / "texts.jsonl", count=documents)
    recipe = write_recipe(folder / "recipe.yaml", recipe_values(folder, **sections))
    prepare(load(recipe, []))
    return recipe


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_blocks(folder: Path, rows, split: str = "train"):
    """Rows of ids (n, T) as a split on disk; each begins with a document."""
    from clm_dist.data.blocks import BlockWriter

    writer = BlockWriter(folder, rows.shape[1], rows.dtype, split)
    writer.write(rows, np.arange(0, rows.size, rows.shape[1]))
    writer.close()


@pytest.fixture
def tiny(tmp_path):
    """A folder with texts and a recipe over them; nothing prepared yet."""
    write_documents(tmp_path / "texts.jsonl")
    write_recipe(tmp_path / "recipe.yaml", recipe_values(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer whose tokens are words."""
    from desk import VOCABULARY, make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "words", VOCABULARY)


@pytest.fixture
def desk(tmp_path, tokenizer):
    """A folder in which documents of these words are written and prepared."""
    from desk import Desk

    return Desk(tmp_path, tokenizer)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a prepared set and a finished one-process run; read only."""
    folder = tmp_path_factory.mktemp("trained")
    generate = {"prompts": ["the cat"], "max_new_tokens": 8}
    recipe = prepare_recipe(folder, 120, generate=generate, train={"max_steps": 30})
    done = run_command("train", recipe)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def launch_warm(tmp_path_factory):
    """As `launch`, but cases under one configuration share the processes that are launched; few are kept (`Launched`).

    For cases that end by themselves. Signals, kills and the launcher's own behaviour need a launch each.
    """
    from launched import KEPT, Launched

    kept: dict[tuple[int, str], Launched] = {}

    def launch(processes, *arguments, script=None, env=None, config="ddp", cwd=ROOT):
        key = processes, config
        launched = kept.pop(key, None) or Launched(tmp_path_factory.mktemp("launched"), *key)
        kept[key] = launched  # the newest is last
        if len(kept) > KEPT:
            kept.pop(next(iter(kept))).end()
        program = [str(script)] if script else ["-m", "clm_dist"]
        return launched.run([*program, *map(str, arguments)], env or {}, cwd)

    yield launch
    for launched in kept.values():
        launched.dismiss()
    for launched in kept.values():
        launched.end()


@pytest.fixture(scope="session")
def command(launch_warm):
    """As `run_command`, in a fork of a process that has imported the packages."""
    return lambda *arguments: launch_warm(1, *arguments)


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real ELI5 answers and the real GPT-2 tokenizer; skips where it is not."""
    folder = Path(os.environ.get("CLM_DIST_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "eli5_category" / "eli5-category-test.json.gz").is_file():
        pytest.skip(f"no real ELI5 data at {folder}; set CLM_DIST_REAL_DATA")
    return folder
