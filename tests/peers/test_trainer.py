"""Parity with what users know: transformers.Trainer and the data pipeline of its causal-LM guide.

Equal where it should be (losses, gradient norms, learning rates, weights), different where we chose to be: one test for
each choice, with the size of the difference. This file is also the program that runs Trainer, in processes of its own,
since Trainer leaves process-wide state behind. docs/parity.md says the same in prose.

Legend: T block_size, G global_batch_size.
"""

import json
import os
import random
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, launch, read_rows, recipe_values, write_documents, write_recipe

from clm_dist import recipe
from clm_dist.data.blocks import Blocks, write_blocks
from clm_dist.data.manifest import read_manifest
from clm_dist.data.order import global_batch
from clm_dist.data.prepare import prepare

STEPS, G, T = 50, 12, 16
LOSS_TOLERANCE = 1e-4  # nats, absolute, at every step
NORM_TOLERANCE = 1e-4  # relative, at every step
WEIGHT_TOLERANCE = 1e-4  # absolute, of every weight after the last step
OPTIM = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "schedule": "linear", "warmup_steps": 0}
LLAMA = {
    "type": "llama",
    "config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}

HALVES = {"per_device_train_batch_size": G // 2, "gradient_accumulation_steps": 2}
# Name: (model, what Trainer is told beyond OPTIM). `mean_loss` is transformers' own switch against a wrong token count,
# see test_trainers_loss_of_gpt2; Llama needs none, so there Trainer is just as it comes.
VARIANTS = {
    "gpt2": ("gpt2", {"mean_loss": True}),
    "gpt2_accumulated": ("gpt2", {"mean_loss": True, **HALVES}),
    "llama": ("llama", {}),
    "llama_accumulated": ("llama", HALVES),
    "gpt2_as_it_comes": ("gpt2", {}),
    "warm_up": ("gpt2", {"max_steps": 4, "warmup_steps": 4}),
    "first_update": ("gpt2", {"max_steps": 1, "warmup_steps": 4}),
    # wrong on purpose: each has to be noticed
    "order_shifted": ("llama", {"shift": 1}),
    "decay_of_norms": ("llama", {"decay_everywhere": True}),
    "no_decay": ("llama", {"weight_decay": 0.0}),
    "no_clipping": ("llama", {"max_grad_norm": 1e9}),
    "rate_1_percent_off": ("llama", {"learning_rate": 1.01 * OPTIM["lr"]}),
}
WRONG = ["order_shifted", "decay_of_norms", "no_decay", "no_clipping", "rate_1_percent_off"]


def peer(processes, command, folder):
    """Runs this file as a program, launched as our own commands are."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    done = launch(processes, command, folder, script=Path(__file__), env={"PYTHONPATH": paths})
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recipes over prepared data of fewer blocks than 50 steps take, so that steps straddle epochs."""
    folder = tmp_path_factory.mktemp("trainer")
    write_documents(folder / "texts.jsonl")
    train = {"max_steps": STEPS, "global_batch_size": G}
    values = recipe_values(folder, optim=OPTIM, train=train)
    write_recipe(folder / "gpt2.yaml", values)
    write_recipe(folder / "llama.yaml", {**values, "model": LLAMA})
    prepare(recipe.load(folder / "gpt2.yaml", []))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """ours(name) -> (rows of training, final weights) of the real command; each name is trained once."""
    overrides = {
        "gpt2_accumulated": [f"train.micro_batch_size={G // 2}"],
        "llama_accumulated": [f"train.micro_batch_size={G // 2}"],
        "warm_up": ["optim.warmup_steps=4", "train.max_steps=4"],
    }
    made = {}

    def run(name):
        if name not in made:
            where = folder / f"ours-{name}"
            arguments = [f"run_dir={where}", *overrides.get(name, [])]
            done = launch(1, "train", folder / f"{VARIANTS[name][0]}.yaml", *arguments)
            assert done.code == 0, done.err
            rows = [row for row in read_rows(where / "metrics.jsonl") if "train/loss" in row]
            made[name] = rows, weights(where)
        return made[name]

    return run


@pytest.fixture(scope="module")
def theirs(folder):
    """theirs(name) -> (log of Trainer, final weights); all variants are trained in one process."""
    peer(1, "train", folder)
    return lambda name: (json.loads((folder / f"log-{name}.json").read_text()), weights(folder / f"trainer-{name}"))


def weights(where):
    """The weights in where/model, without the bias of GPT-2's keys: softmax does not see it, so that its gradient is
    rounding alone, which Adam makes a full step of."""
    from safetensors.numpy import load_file

    tensors = load_file(where / "model" / "model.safetensors")
    for name in tensors:
        if name.endswith("attn.c_attn.bias"):
            queries, _, values = np.split(tensors[name], 3)
            tensors[name] = np.concatenate([queries, values])
    return tensors


def differences(ours, theirs):
    """The largest ones, over all steps and weights."""
    (rows, mine), (log, other) = ours, theirs
    assert len(rows) == len(log) == STEPS and mine.keys() == other.keys()
    pairs = list(zip(rows, log, strict=True))
    return {
        "loss": max(abs(a["train/loss"] - b["loss"]) for a, b in pairs),
        "norm": max(abs(a["train/grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
        "rate": max(abs(a["train/lr"] - b["learning_rate"]) for a, b in pairs),
        "weight": max(float(np.abs(mine[name] - other[name]).max()) for name in mine),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gpt2_accumulated", "llama", "llama_accumulated"])
def test_fifty_steps_are_trainers(ours, theirs, name):
    found = differences(ours(name), theirs(name))
    print(name, found)
    assert found["loss"] < LOSS_TOLERANCE
    assert found["norm"] < NORM_TOLERANCE
    assert found["rate"] < 1e-12
    assert found["weight"] < WEIGHT_TOLERANCE
    # the comparison covers what it should: learning, clipped and unclipped steps, and seams between epochs
    rows = ours(name)[0]
    norms = [row["train/grad_norm"] for row in rows]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 1
    assert min(norms) < OPTIM["max_grad_norm"] < max(norms)
    assert rows[-1]["train/epoch"] > 2 and rows[-1]["train/epoch"] % 1


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_trainer_set_up_otherwise_is_noticed(ours, theirs, name):
    """The tolerances mean something: one setting that is not ours breaks them, mostly by far."""
    found = differences(ours("llama"), theirs(name))
    print(name, found)
    assert found["loss"] > 3 * LOSS_TOLERANCE or found["weight"] > 3 * WEIGHT_TOLERANCE


@pytest.mark.slow
def test_trainers_loss_of_gpt2(ours, theirs):
    """On purpose: nats per scored token. Trainer divides by all T tokens of a block where the class is not called
    ...ForCausalLM (GPT2LMHeadModel), though the first is not scored: its loss and gradient are (T - 1) / T of the true."""
    (row, *_), _ = ours("gpt2")
    (log, *_), _ = theirs("gpt2_as_it_comes")
    assert log["loss"] == pytest.approx(row["train/loss"] * 15 / 16, rel=1e-5)
    assert log["grad_norm"] == pytest.approx(row["train/grad_norm"] * 15 / 16, rel=1e-5)


@pytest.mark.slow
def test_warm_up_starts_with_a_step(folder, ours, theirs):
    """On purpose: update k of a warm-up of 4 has k/4 of the peak. Trainer's has (k - 1)/4, so its first does nothing."""
    assert [row["train/lr"] for row in ours("warm_up")[0]] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3])
    assert [row["learning_rate"] for row in theirs("warm_up")[0]] == pytest.approx([0.0, 0.75e-3, 1.5e-3, 2.25e-3])
    initial_model(recipe.load(folder / "gpt2.yaml", [])).save_pretrained(folder / "initial" / "model")
    before, after = weights(folder / "initial"), theirs("first_update")[1]
    assert all((before[name] == after[name]).all() for name in after)


@pytest.mark.slow
@pytest.mark.distributed
def test_evaluation_at_two_processes(folder, ours):
    """On purpose: sum of nll over count of tokens. Trainer weights the last batch by the samples that are left in it, but
    takes the mean of a batch that was filled up with the first samples: wrong at two processes, right at one."""
    ours("llama"), ours("gpt2")
    ids = Blocks(folder / "prepared" / "eval")[list(range(9))]
    ids[8] = random.Random(0).choices(range(257), k=T)  # noise, so that the ninth block is much harder than the others
    write_blocks(folder / "nine", [ids], T, ids.dtype, "eval")
    peer(1, "evaluate", folder)
    peer(2, "evaluate", folder)
    one, two = (json.loads((folder / f"evaluation-{processes}.json").read_text()) for processes in (1, 2))
    nll = one["llama"]["nll_per_token"]  # of each block, float64
    exact = sum(nll) / 9
    assert one["llama"]["ours"] == pytest.approx(exact, rel=1e-6)
    assert two["llama"]["ours"] == one["llama"]["ours"]
    assert one["llama"]["trainer"] == pytest.approx(exact, rel=1e-6)
    # batches of four: 0 1 2 3 and 4 5 6 7, then 8 0 1 2 on rank 0, whose mean stands for block 8
    assert two["llama"]["trainer"] == pytest.approx((sum(nll[:8]) + (nll[8] + sum(nll[:3])) / 4) / 9, rel=1e-6)
    assert two["llama"]["trainer"] < exact - 0.1
    print(f"exact {exact}, ours {two['llama']['ours']}, Trainer's {one['llama']['trainer']}, {two['llama']['trainer']}")
    # and GPT-2's is low by (T - 1) / T in evaluation too
    exact = sum(one["gpt2"]["nll_per_token"]) / 9
    assert one["gpt2"]["ours"] == pytest.approx(exact, rel=1e-6)
    assert one["gpt2"]["trainer"] == pytest.approx(exact * 15 / 16, rel=1e-6)


# ---- the guide's pipeline

LENGTH, DOCUMENTS = 128, 2500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """2,500 documents of three words in two answers, and a tokenizer for which a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    texts = [draw.choices(words, k=3) for _ in range(DOCUMENTS)]
    documents = [{"answers": {"text": [f"{a} {b}", c]}} for a, b, c in texts]
    (folder / "texts.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<|endoftext|>", *words])}, "<|endoftext|>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, documents, tokenizer


def prepared(folder, append_eos):
    """Our blocks of the corpus, in the order of the documents, and their counts."""
    data = {"text_column": "answers.text", "eval_fraction": 0, "block_size": LENGTH, "append_eos": append_eos}
    data |= {"tokenizer": str(folder / "tokenizer"), "tokenizer_vocab_size": None}
    data |= {"prepared_dir": str(folder / f"prepared-{append_eos}")}
    config = recipe.build(recipe_values(folder, data=data))
    prepare(config)
    blocks = Blocks(Path(config.data.prepared_dir) / "train")
    return blocks[range(len(blocks))], read_manifest(config.data.prepared_dir).splits["train"]


def guides_blocks(documents, tokenizer):
    """The causal-LM guide's preparation: one `map` that joins and tokenises, one that cuts what it is given at a time."""
    import datasets

    def join_and_tokenise(rows):
        return {"input_ids": tokenizer([" ".join(texts) for texts in rows["answers.text"]])["input_ids"]}

    def cut(rows):
        ids = list(chain.from_iterable(rows["input_ids"]))
        return {"input_ids": [ids[end - LENGTH : end] for end in range(LENGTH, len(ids) + 1, LENGTH)]}

    data = datasets.Dataset.from_list(documents).flatten()
    data = data.map(join_and_tokenise, batched=True, remove_columns=data.column_names)
    return np.array(data.map(cut, batched=True)["input_ids"][:])


def test_end_of_text_stands_between_documents(corpus):
    """On purpose: the guide runs documents into one another."""
    folder, documents, tokenizer = corpus
    theirs, (ours, _) = guides_blocks(documents, tokenizer), prepared(folder, append_eos=True)
    assert not (theirs == 0).any()
    stream = ours.reshape(-1, 4)  # documents of three words and end-of-text, LENGTH is a multiple of four
    assert (stream[:, 3] == 0).all() and (stream[:, :3] != 0).all()
    # the rest of the stream is theirs, up to where they first drop a remainder
    assert (stream[:, :3].ravel()[: 23 * LENGTH] == theirs[:23].ravel()).all()


def test_the_guides_collator_would_hide_end_of_text(corpus):
    """On purpose: we score every token. The guide pads with end-of-text and its collator takes all padding out of the
    labels, so that a model would not learn to end even if the token were there."""
    from transformers import DataCollatorForLanguageModeling

    _, _, tokenizer = corpus
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.pad_token = tokenizer.eos_token
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": [5, 6, 7, 0, 8]}])
    assert batch["labels"].tolist() == [[5, 6, 7, -100, 8]]


def test_one_remainder_a_split(corpus):
    """On purpose: the guide's grouping loses one remainder per 1,000 rows, ours one per split."""
    folder, documents, tokenizer = corpus
    theirs, (ours, counts) = guides_blocks(documents, tokenizer), prepared(folder, append_eos=False)
    # theirs: 3,000 = 23 x 128 + 56 tokens, the same again, then 1,500 = 11 x 128 + 92: 204 of 7,500 are lost
    assert len(theirs) == 23 + 23 + 11 and 7500 - theirs.size == 56 + 56 + 92
    # ours: 7,500 = 58 x 128 + 76
    assert (counts.tokens, counts.blocks, counts.remainder) == (7500, 58, 76) and len(ours) == 58
    ours, theirs = ours.ravel(), theirs.ravel()
    first, second = 23 * 128, 46 * 128  # where theirs is torn
    assert (theirs[:first] == ours[:first]).all() and theirs[first] != ours[first]
    assert (theirs[first:second] == ours[first + 56 : second + 56]).all()
    assert (theirs[second:] == ours[second + 112 : second + 112 + 11 * 128]).all()


# ---- the program


def train_with_trainer(folder):
    """Every variant from our initial weights over our blocks in our order."""
    import torch
    from transformers import Trainer, TrainingArguments, default_data_collator

    class InOrder(Trainer):
        everywhere = False

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def get_decay_parameter_names(self, model):
            everything = [name for name, _ in model.named_parameters()]
            return everything if self.everywhere else super().get_decay_parameter_names(model)

    for name, (model_name, variant) in VARIANTS.items():
        config = recipe.load(folder / f"{model_name}.yaml", [])
        blocks = Blocks(folder / "prepared" / "train")
        settings = {
            "output_dir": str(folder / f"trainer-{name}"),
            "max_steps": STEPS,
            "per_device_train_batch_size": G,
            "learning_rate": OPTIM["lr"],
            "weight_decay": OPTIM["weight_decay"],
            "max_grad_norm": OPTIM["max_grad_norm"],
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            **variant,
        }
        InOrder.everywhere = settings.pop("decay_everywhere", False)
        shift = settings.pop("shift", 0)
        model = initial_model(config)
        if settings.pop("mean_loss", False):
            model.accepts_loss_kwargs = False
        stream = [global_batch(step + shift, G, len(blocks), config.seed) for step in range(STEPS)]
        rows, arguments = rows_of(blocks[np.concatenate(stream)]), TrainingArguments(**settings)
        trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
        trainer.train()
        trainer.save_model(str(folder / f"trainer-{name}" / "model"))
        log = [row for row in trainer.state.log_history if "loss" in row]
        (folder / f"log-{name}.json").write_text(json.dumps(log))


def evaluate_with_both(folder):
    """Trainer's loss of the nine blocks in batches of four, ours, and that of each block in float64."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    from clm_dist.training.evaluate import evaluate

    blocks, found = Blocks(folder / "nine"), {}
    rows = rows_of(blocks[range(9)])
    for name in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(folder / f"ours-{name}" / "model")
        arguments = TrainingArguments(
            output_dir=str(folder / "evaluated"), per_device_eval_batch_size=4, report_to="none", use_cpu=True
        )
        trainer = Trainer(model=model, args=arguments, eval_dataset=rows, data_collator=default_data_collator)
        theirs = trainer.evaluate()["eval_loss"]
        ours = evaluate(trainer.accelerator, model, blocks, 4, 1.0).loss
        ids = torch.tensor([row["input_ids"] for row in rows])
        with torch.no_grad():
            logs = model.double()(ids).logits[:, :-1].log_softmax(-1)
        nll = -logs.gather(2, ids[:, 1:, None]).mean((1, 2))
        found[name] = {"trainer": theirs, "ours": ours, "nll_per_token": nll.tolist()}
    if trainer.is_world_process_zero():
        (folder / f"evaluation-{trainer.accelerator.num_processes}.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()


def initial_model(config):
    """What our own run starts from."""
    from clm_dist.data.tokenize import load_tokenizer, token_ids
    from clm_dist.model.build import build_model, model_configuration

    tokenizer = load_tokenizer(f"{config.data.prepared_dir}/tokenizer")
    return build_model(config.model, model_configuration(config.model, token_ids(tokenizer)), config.seed)


def rows_of(blocks):
    """Blocks as Trainer takes them; the model shifts the labels itself."""
    return [{"input_ids": block.tolist(), "labels": block.tolist()} for block in blocks]


if __name__ == "__main__":
    {"train": train_with_trainer, "evaluate": evaluate_with_both}[sys.argv[1]](Path(sys.argv[2]))
