"""Parity with what users know: transformers.Trainer and the data pipeline of its causal-LM guide. docs/parity.md in code.

Equal where it should be, different where we chose to be: one test for each choice, with the size of the difference. At
the end stands the program that runs Trainer, in processes of its own since Trainer leaves process-wide state behind.

Legend: T block_size, G global_batch_size.
"""

import functools
import json
import random
import sys
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, launch, read_rows, recipe_values, write_blocks, write_documents, write_recipe
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from clm_dist import recipe
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import read_manifest
from clm_dist.data.order import global_batch
from clm_dist.data.tokenize import load_tokenizer, token_ids
from clm_dist.model import build
from clm_dist.model.configuration import model_configuration
from clm_dist.model.objective import find_objective
from clm_dist.preparation.prepare import prepare
from clm_dist.training.batches import Batches
from clm_dist.training.evaluate import evaluate as exact_evaluation

STEPS, G, T = 50, 12, 16
TOLERANCE = {"loss": 1e-4, "norm": 1e-5, "rate": 1e-12, "weight": 1e-5}  # absolute (loss in nats), norm relative
OPTIM = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "schedule": "linear", "warmup_steps": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"type": "llama", "config": {**SIZES, "max_position_embeddings": 64}}
# sums in Trainer's order, and GELU by the same operation: otherwise Adam makes whole steps of what is rounding
WHOLE = "train.chunked_loss=false"
HALF, HALVES = f"train.micro_batch_size={G // 2}", {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
UNFUSED = {"written_out": True}  # GELU too as transformers has it
MEAN = {"accepts_loss_kwargs": False}  # transformers' own switch against the count in test_trainers_loss_of_gpt2
# Name: (model, our overrides of the recipe, what Trainer is told). Llama with Trainer just as it comes needs no switch.
VARIANTS = {
    "gpt2": ("gpt2", [WHOLE], MEAN),
    "gpt2_by_chunks": ("gpt2", [], {**MEAN, **UNFUSED}),
    "gpt2_accumulated": ("gpt2", [WHOLE, HALF], {**MEAN, **HALVES}),
    "llama": ("llama", [WHOLE], {}),
    "llama_accumulated": ("llama", [WHOLE, HALF], HALVES),
    "gpt2_as_it_comes": ("gpt2", [], UNFUSED),
    "warm_up": ("gpt2", ["train.max_steps=4", "optim.warmup_steps=4"], {"max_steps": 4, "warmup_steps": 4}),
}
WRONG = {
    "order_shifted": {"shift": 1},
    "norms_decay_too": {"decay_everywhere": True},
    "no_clipping": {"max_grad_norm": 1e9},
    "rate_1_percent_off": {"learning_rate": 1.01 * OPTIM["lr"]},
}


def peer(processes, command, folder):
    """Runs this file as a program, launched as our own commands are."""
    done = launch(processes, command, folder, script=Path(__file__), env={"PYTHONPATH": str(ROOT / "tests")})
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recipes over prepared data of fewer blocks than 50 steps take, so that steps straddle epochs."""
    folder = tmp_path_factory.mktemp("trainer")
    write_documents(folder / "texts.jsonl")
    values = recipe_values(folder, optim=OPTIM, train={"max_steps": STEPS, "global_batch_size": G})
    write_recipe(folder / "gpt2.yaml", values)
    write_recipe(folder / "llama.yaml", {**values, "model": LLAMA})
    prepare(recipe.load(folder / "gpt2.yaml", []))
    return folder


@pytest.fixture(scope="module")
def ours(launch_warm, folder):
    """ours(name) -> (rows of training, final weights) of the real command; each name is trained once."""

    @functools.cache
    def run(name):
        (model, overrides, _), where = VARIANTS[name], folder / f"ours-{name}"
        done = launch_warm(1, "train", folder / f"{model}.yaml", f"run_dir={where}", *overrides)
        assert done.code == 0, done.err
        return [row for row in read_rows(where / "metrics.jsonl") if "train/loss" in row], weights(where)

    return run


@pytest.fixture(scope="module")
def theirs(folder):
    """theirs(name) -> (log of Trainer, final weights); all variants are trained in one process."""
    peer(1, "train", folder)
    return lambda name: (json.loads((folder / f"log-{name}.json").read_text()), weights(folder / f"trainer-{name}"))


def weights(where):
    """Without the bias of GPT-2's keys: softmax does not see it, so its gradient is rounding, which Adam blows up."""
    tensors = load_file(where / "model" / "model.safetensors")
    return tensors | {name: tensors[name].reshape(3, -1)[[0, 2]] for name in tensors if name.endswith("c_attn.bias")}


def differences(ours, theirs):
    """The largest ones, over all steps and weights."""
    (rows, mine), (log, other) = ours, theirs
    assert len(rows) == len(log) == STEPS and mine.keys() == other.keys()
    pairs = list(zip(rows, log, strict=True))
    found = {
        "loss": max(abs(a["train/loss"] - b["loss"]) for a, b in pairs),
        "norm": max(abs(a["train/grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
        "rate": max(abs(a["train/lr"] - b["learning_rate"]) for a, b in pairs),
        "weight": max(float(np.abs(mine[name] - other[name]).max()) for name in mine),
    }
    print("largest differences:", found)  # shown with pytest -s, the figures of docs/parity.md
    return found


@pytest.mark.slow
def test_the_loss_by_chunks_learns_the_same(ours, theirs):
    """Ours as it comes against the model as transformers has it: losses within the same bound, norms within ten times it,
    weights as far as fifty of Adam's steps carry a rounding."""
    found = differences(ours("gpt2_by_chunks"), theirs("gpt2_by_chunks"))
    assert found["loss"] < TOLERANCE["loss"] and found["rate"] < TOLERANCE["rate"], found
    assert found["norm"] < 1e-4 and found["weight"] < 5 * OPTIM["lr"], found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gpt2_accumulated", "llama", "llama_accumulated"])
def test_fifty_steps_are_trainers(ours, theirs, name):
    found = differences(ours(name), theirs(name))
    assert all(found[what] < TOLERANCE[what] for what in TOLERANCE), found
    rows = ours(name)[0]  # cover what they should: learning, clipped and unclipped steps, seams between epochs
    norms = [row["train/grad_norm"] for row in rows]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 1
    assert min(norms) < OPTIM["max_grad_norm"] < max(norms)
    assert rows[-1]["train/epoch"] > 2 and rows[-1]["train/epoch"] % 1


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_trainer_set_up_otherwise_is_noticed(ours, theirs, name):
    """The tolerance means something: one setting that is not ours breaks it by far."""
    assert differences(ours("llama"), theirs(name))["loss"] > 10 * TOLERANCE["loss"]


@pytest.mark.slow
def test_trainers_loss_of_gpt2(ours, theirs):
    """On purpose: nats per scored token. Trainer divides by all T tokens of a block where the class is not called
    ...ForCausalLM (GPT2LMHeadModel), though the first is not scored: its loss and gradient are (T - 1) / T of the true."""
    row, log = ours("gpt2")[0][0], theirs("gpt2_as_it_comes")[0][0]  # of the first step
    assert log["loss"] == pytest.approx(row["train/loss"] * 15 / 16, rel=1e-5)
    assert log["grad_norm"] == pytest.approx(row["train/grad_norm"] * 15 / 16, rel=1e-5)


@pytest.mark.slow
def test_warm_up_starts_with_a_step(ours, theirs):
    """On purpose: update k of a warm-up of 4 has k/4 of the peak. Trainer's has (k - 1)/4, so its first does nothing."""
    assert [row["train/lr"] for row in ours("warm_up")[0]] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3])
    assert [row["learning_rate"] for row in theirs("warm_up")[0]] == pytest.approx([0.0, 0.75e-3, 1.5e-3, 2.25e-3])


@pytest.mark.slow
@pytest.mark.distributed
def test_evaluation_at_two_processes(folder, ours):
    """On purpose: sum of nll over count of tokens. Trainer weights the last batch by the samples that are left in it, but
    takes the mean of a batch that was filled up with the first samples: right at one process, wrong at two."""
    ours("llama"), ours("gpt2")
    ids = Blocks(folder / "prepared" / "eval")[range(9)]
    ids[8] = random.Random(0).choices(range(257), k=T)  # noise: the ninth block is much harder than the others
    write_blocks(folder / "nine", ids, "eval")
    peer(1, "evaluate", folder)
    peer(2, "evaluate", folder)
    one, two = (json.loads((folder / f"evaluation-{processes}.json").read_text()) for processes in (1, 2))
    print("one process:", one, "two processes:", two)
    nll = one["llama"]["blocks"]
    exact = pytest.approx(sum(nll) / 9, rel=1e-6)
    assert one["llama"]["ours"] == exact and two["llama"]["ours"] == one["llama"]["ours"]
    assert one["llama"]["trainer"] == exact
    # batches of four: 0 1 2 3 on rank 0 and 4 5 6 7 on rank 1, then 8 0 1 2 on rank 0, whose mean stands for block 8
    assert two["llama"]["trainer"] == pytest.approx((sum(nll[:8]) + (nll[8] + sum(nll[:3])) / 4) / 9, rel=1e-6)
    assert two["llama"]["trainer"] < sum(nll) / 9 - 0.1
    # and GPT-2's is low by (T - 1) / T in evaluation too
    assert one["gpt2"]["ours"] == pytest.approx(sum(one["gpt2"]["blocks"]) / 9, rel=1e-6)
    assert one["gpt2"]["trainer"] == pytest.approx(sum(one["gpt2"]["blocks"]) / 9 * 15 / 16, rel=1e-6)


# ---- The guide's pipeline: 2,500 documents of three words, a word is a token, blocks of 128


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder of a recipe's source and tokenizer, the documents as ELI5 has them: a list of answers, the tokenizer)"""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = [f"word{number}" for number in range(500)]
    texts = [draw.choices(words, k=3) for _ in range(2500)]
    documents = [{"answers": {"text": [f"{a} {b}", c]}} for a, b, c in texts]
    (folder / "texts.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<|endoftext|>", *words])}, "<|endoftext|>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=level, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, documents, tokenizer


def our_blocks(folder, append_eos):
    """Our blocks of the corpus, in the order of the documents, and their counts."""
    data = {"text_column": "answers.text", "eval_fraction": 0, "block_size": 128, "append_eos": append_eos}
    data |= {"tokenizer": str(folder / "tokenizer"), "tokenizer_vocab_size": None}
    config = recipe.build(recipe_values(folder, data={**data, "prepared_dir": str(folder / f"prepared-{append_eos}")}))
    prepare(config)
    blocks = Blocks(Path(config.data.prepared_dir) / "train")
    return blocks[range(len(blocks))], read_manifest(config.data.prepared_dir).splits["train"]


def guides_blocks(documents, tokenizer):
    """The causal-LM guide's preparation: one `map` joins and tokenises, one cuts up the 1,000 rows it is given at a time."""

    def tokenise(rows):
        return {"ids": tokenizer([" ".join(texts) for texts in rows["answers.text"]])["input_ids"]}

    def cut(rows):
        ids = list(chain.from_iterable(rows["ids"]))
        return {"ids": [ids[end - 128 : end] for end in range(128, len(ids) + 1, 128)]}

    data = datasets.Dataset.from_list(documents).flatten().map(tokenise, batched=True, remove_columns=["answers.text"])
    return np.array(data.map(cut, batched=True)["ids"][:])


def test_end_of_text_stands_between_documents(corpus):
    """On purpose: the guide runs documents into one another. Where the token is there nevertheless, the guide's collator
    takes it out of the labels, since the guide pads with it: a model would not learn to end."""
    folder, documents, tokenizer = corpus
    theirs, (ours, _) = guides_blocks(documents, tokenizer), our_blocks(folder, append_eos=True)
    assert (theirs != 0).all()
    stream = ours.reshape(-1, 4)  # three words and end-of-text; 128 is a multiple of four
    assert (stream[:, 3] == 0).all() and (stream[:, :3] != 0).all()
    tokenizer.pad_token = tokenizer.eos_token
    batch = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": [5, 6, 7, 0, 8]}])
    assert batch["labels"].tolist() == [[5, 6, 7, -100, 8]]


def test_one_remainder_a_split(corpus):
    """On purpose: the guide's grouping loses one remainder per 1,000 rows, ours one per split."""
    folder, documents, tokenizer = corpus
    theirs, (ours, counts) = guides_blocks(documents, tokenizer), our_blocks(folder, append_eos=False)
    # theirs: 3,000 = 23 x 128 + 56 tokens, the same again, then 1,500 = 11 x 128 + 92: 204 of 7,500 are lost
    assert len(theirs) == 23 + 23 + 11 and 7500 - theirs.size == 56 + 56 + 92
    assert (counts.tokens, counts.blocks, counts.remainder) == (7500, 58, 76)  # 7,500 = 58 x 128 + 76
    ours, theirs = ours.ravel(), theirs.ravel()
    first, second, end = 23 * 128, 46 * 128, 57 * 128  # theirs is torn at the first two
    assert (theirs[:first] == ours[:first]).all() and theirs[first] != ours[first]
    assert (theirs[first:second] == ours[first + 56 : second + 56]).all()
    assert (theirs[second:end] == ours[second + 112 : end + 112]).all()


# ---- The program


def train(folder):
    """Trainer: every variant from our initial weights over our blocks in our order."""
    blocks = Blocks(folder / "prepared" / "train")
    ids = token_ids(load_tokenizer(str(folder / "prepared" / "tokenizer")))
    common = {"learning_rate": OPTIM["lr"], "lr_scheduler_type": "linear", "max_steps": STEPS, "logging_steps": 1}
    common |= {"per_device_train_batch_size": G, "train_sampling_strategy": "sequential", "save_strategy": "no"}
    common |= {"weight_decay": 0.1, "max_grad_norm": 1.0, "report_to": "none", "use_cpu": True}
    for name, (model_name, _, told) in {**VARIANTS, **{name: ("llama", [], WRONG[name]) for name in WRONG}}.items():
        settings, config = {**common, **told}, recipe.load(folder / f"{model_name}.yaml", [])
        first, everywhere = settings.pop("shift", 0), settings.pop("decay_everywhere", False)
        with patch.object(build, "fuse_gelu") if settings.pop("written_out", False) else nullcontext():
            model = build.build_model(config.model, model_configuration(config.model, ids), config.seed)
        if "accepts_loss_kwargs" in settings:
            model.accepts_loss_kwargs = settings.pop("accepts_loss_kwargs")
        order = [global_batch(step, G, len(blocks), config.seed) for step in range(first, first + STEPS)]
        arguments = transformers.TrainingArguments(str(folder / f"trainer-{name}"), **settings)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows_of(blocks[np.concatenate(order)]))
        if everywhere:
            trainer.get_decay_parameter_names = lambda model: [name for name, _ in model.named_parameters()]
        trainer.train()
        trainer.save_model(str(folder / f"trainer-{name}" / "model"))
        log = [row for row in trainer.state.log_history if "loss" in row]
        (folder / f"log-{name}.json").write_text(json.dumps(log))


def evaluate(folder):
    """The loss of the nine blocks in batches of four by Trainer and by us, and that of each block in float64."""
    blocks, found = Blocks(folder / "nine"), {}
    rows, ids = rows_of(blocks[range(9)]), torch.from_numpy(blocks[range(9)].astype("int64"))
    settings = {"per_device_eval_batch_size": 4, "report_to": "none", "use_cpu": True}
    arguments = transformers.TrainingArguments(str(folder), **settings)
    for name in ("llama", "gpt2"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / f"ours-{name}" / "model")
        trainer = transformers.Trainer(model, arguments, eval_dataset=rows)
        loss = trainer.evaluate()["eval_loss"]
        batches = Batches(blocks, False, model.device)
        ours = exact_evaluation(trainer.accelerator, model, find_objective(model), batches, 4, 1.0).loss
        with torch.no_grad():
            log_likelihoods = model.double()(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        found[name] = {"trainer": loss, "ours": ours, "blocks": (-log_likelihoods.mean((1, 2))).tolist()}
    if trainer.is_world_process_zero():
        (folder / f"evaluation-{trainer.accelerator.num_processes}.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()


def rows_of(blocks):
    """Blocks as Trainer takes them; the model shifts the labels itself."""
    return [{"input_ids": block.tolist(), "labels": block.tolist()} for block in blocks]


if __name__ == "__main__":
    {"train": train, "evaluate": evaluate}[sys.argv[1]](Path(sys.argv[2]))
