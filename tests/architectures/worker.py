"""Trains one architecture after another in one group of processes, by the real `train`, and writes down what held.

    worker.py FOLDER KIND TYPE ...      KIND: ddp, zero2, zero3 (what it was launched with); ddp+ looks at more

FOLDER holds prepared data; FOLDER/results-KIND/TYPE.0.json is what came out, a cell for each promise: "yes", or why not.
What needs no processes is looked at by the second rank meanwhile: TYPE.1.json.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

import clm_dist.training.train as training
from clm_dist import recipe
from clm_dist.data.tokenize import load_tokenizer
from clm_dist.errors import UserError
from clm_dist.model.architectures import BY_TYPE
from clm_dist.training import publishing
from clm_dist.watch.watch import Watch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import cells  # noqa: E402

STEPS = 30
NO_BYTE = "\u00ff"  # 0xff, as byte-level BPE writes it
RESUMED = ("gpt2", "llama", "mixtral", "mamba", "bert", "bart", "transfo-xl")  # under ZeRO: of each kind
FOLDER, KIND, *TYPES = sys.argv[1:]
KIND, LONGER = KIND.rstrip("+"), KIND.endswith("+")
RANK = int(os.environ.get("RANK", "0"))


def values(type_: str, run: Path, **train) -> dict:
    """The recipe of a case."""
    return {
        "run_dir": str(run),
        "data": {
            "source": f"{FOLDER}/texts.jsonl",
            "prepared_dir": f"{FOLDER}/prepared",
            "eval_fraction": 0.2,
            "tokenizer_vocab_size": 300,
            "block_size": 32,
        },
        "model": {"type": type_, "preset": "tiny", "config": padding(type_)},
        "optim": {"lr": 5e-3},
        "train": {"max_steps": STEPS, "global_batch_size": 8, "log_every": 5, "mixed_precision": "no", **train},
        "checkpoint": {"save_every": STEPS // 2, "asynchronous": False},
        "evaluate": {"micro_batch_size": 8, "every_steps": STEPS},
        "generate": {"prompts": ["the cat"], "max_new_tokens": 6, "do_sample": False},
    }


def padding(type_: str) -> dict[str, int]:
    """An id that no text has, for those that look for padding in it: a byte that UTF-8 never has."""
    if type_ not in BY_TYPE or not BY_TYPE[type_].needs_padding:
        return {}
    tokenizer = load_tokenizer(f"{FOLDER}/prepared/tokenizer")
    return {"pad_index" if type_ == "xlm" else "pad_token_id": tokenizer.convert_tokens_to_ids(NO_BYTE)}


def train(type_: str, run: Path, **options) -> recipe.Config:
    """One run, as a user's; the group of processes stays."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    config = recipe.build(values(type_, run, **options))
    training.train(config, watch=Watch())
    return config


def rows(config: recipe.Config, key: str) -> list[float]:
    """A metric over the run."""
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def case(type_: str) -> dict[str, str]:
    """The cells of one architecture. Every rank must call this, and has its own."""
    run = Path(FOLDER, KIND, type_)
    config = train(type_, run)
    found = {"trained": "yes"}
    before, *_, after = rows(config, "eval/loss")
    found["loss falls"] = "yes" if after < before - 0.1 else f"no: {before:.3f} to {after:.3f} nats a token"
    if KIND == "ddp" or type_ in RESUMED:
        resumed = Path(FOLDER, KIND, f"{type_}-resumed")
        train(type_, resumed, resume=str(run / "checkpoints" / f"step-{STEPS // 2:08d}"))
        found["resume exact"] = cells.same_weights(run / "model", resumed / "model") if RANK == 0 else ""
    if RANK == 0:
        return found | cells.of_the_run(config, before, after)
    return cells.of_the_model(config, LONGER) if KIND == "ddp" else {}


def main() -> None:
    """Every type, whatever happened to the one before it."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    training.finish = lambda accelerator: accelerator.wait_for_everyone()  # the group is needed again
    publishing.pages = lambda *_: {}  # the card's picture takes as long as the training
    results = Path(FOLDER, f"results-{KIND}")
    results.mkdir(exist_ok=True)
    for type_ in TYPES:
        began = time.monotonic()
        try:
            found = case(type_)
        except UserError as error:
            found = {"trained": f"no: {error}"}
        except Exception as error:  # the others are to be seen all the same; both ranks fail alike
            traceback.print_exc()
            found = {"trained": f"no: {type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        (results / f"{type_}.{RANK}.json").write_text(json.dumps(found, indent=1))
        print(f"{type_}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
