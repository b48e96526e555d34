"""`clm-dist plan`: a table, JSON, and one message for bad input; no data, no GPU and no network."""

import json
import re

import pytest
from conftest import ROOT, recipe_values, write_recipe
from tiny_models import TINY

from clm_dist.cli import main

NO_ROOM = ["--gpus", "2", "--gpu-memory", "2.2"]
ROOM = ["--gpus", "2", "--gpu-memory", "24"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return str(write_recipe(folder / "recipe.yaml", recipe_values(folder)))


def test_a_table_before_anything_is_prepared(recipe, capsys):
    assert main(["plan", recipe, *ROOM]) == 0
    out = capsys.readouterr().out
    for needle in (
        "gpt2: 37,120 parameters, bf16, blocks of 16 tokens, 12 sequences = 192 tokens per step",
        "2 GPUs of 24 GiB; 21.6 GiB of each can be planned with",
        "steps and tokens per epoch are not known: nothing is prepared in",
        "recommended: ddp, micro-batch 6, 1 micro-step per step",
        "time: not known; give --tflops X",
        f"accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m clm_dist train {recipe} "
        "train.micro_batch_size=6",
    ):
        assert needle in out, out
    assert [line.split()[0] for line in out.splitlines() if line[:4] in ("ddp ", "zero", "fsdp")] == [
        *("ddp", "ddp", "zero1", "zero1", "zero2", "zero2", "zero3", "zero3"),
        *("fsdp2", "fsdp2", "zero2_offload", "zero2_offload", "zero3_offload", "zero3_offload"),
    ]


def test_an_evaluation_that_does_not_fit_is_made_smaller(recipe, capsys):
    """34 numbers of 4 bytes for each of 16 x 32 of a sequence: in 21.6 GiB there is no room for a million sequences. With
    whole logits 16 x 300 of them take 10 bytes each."""
    assert main(["plan", recipe, *ROOM, "evaluate.micro_batch_size=1000000"]) == 0
    out = capsys.readouterr().out
    [room] = re.findall(r"evaluate.micro_batch_size=1000000 does not fit, (\d+) sequences do; the command", out)
    assert 21.6 * 2**30 * 0.99 / (16 * 32 * 34 * 4) < int(room) < 21.62 * 2**30 / (16 * 32 * 34 * 4)
    assert main(["plan", recipe, *ROOM, "evaluate.micro_batch_size=1000000", "train.chunked_loss=false"]) == 0
    [whole] = re.findall(r"does not fit, (\d+) sequences do; the command", capsys.readouterr().out)
    assert 21.6 * 2**30 * 0.99 / (16 * 300 * 10) < int(whole) < 21.62 * 2**30 / (16 * 300 * 10)
    assert f"evaluate.micro_batch_size={room} " in out.splitlines()[-1]
    assert main(["plan", recipe, *ROOM]) == 0
    assert "evaluate" not in capsys.readouterr().out


def test_json_of_a_prepared_set(trained, capsys):
    """The run of the fixture has 120 texts prepared; the counts are those of its manifest."""
    manifest = json.loads((trained / "prepared" / "manifest.json").read_text())
    blocks = manifest["splits"]["train"]["blocks"]
    arguments = [
        "plan",
        str(trained / "recipe.yaml"),
        *ROOM,
        "--tflops",
        "0.001",
        "--json",
        "train.mixed_precision=bf16",
    ]
    assert main(arguments) == 0
    outlook = json.loads(capsys.readouterr().out)
    assert outlook["steps_per_epoch"] == -(-blocks // 12)
    assert outlook["tokens_per_epoch"] == blocks * 16
    assert outlook["mixed_precision"] == "bf16" and outlook["by_formula"] == ""
    ddp = outlook["rows"][0]
    parts = ("parameters", "gradients", "optimizer_states", "buffers", "activations", "logits")
    assert ddp["total"] == sum(ddp[part] for part in parts)
    assert ddp["parameters"] == 4 * outlook["parameters"]
    assert outlook["recommended"] == ddp
    assert ddp["seconds_per_step"] == pytest.approx(ddp["flops_per_token"] * 192 / 2e9)


def test_blocks_of_another_size_are_no_epoch(trained, capsys):
    assert main(["plan", str(trained / "recipe.yaml"), *ROOM, "data.block_size=8"]) == 0
    assert "holds blocks of 16 tokens: prepare for 8" in capsys.readouterr().out


def test_selective_checkpointing_is_planned_where_the_recipe_has_it(recipe, capsys):
    kinds = {}
    for given in ("false", "selective"):
        assert main(["plan", recipe, *ROOM, f"train.activation_checkpointing={given}", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        kinds[given] = {row["activation_checkpointing"]: row["activations"] for row in rows if row["strategy"] == "ddp"}
    assert list(kinds["false"]) == [False, True] and list(kinds["selective"]) == [False, "selective", True]
    assert kinds["selective"][True] < kinds["selective"]["selective"] < kinds["selective"][False]
    assert main(["plan", recipe, *ROOM, "train.activation_checkpointing=selective"]) == 0
    assert re.search(r"^ddp +selective ", capsys.readouterr().out, re.MULTILINE)


def test_nothing_fits(recipe, capsys):
    large = ["model.config.n_embd=16384", "model.config.n_layer=4"]
    assert main(["plan", recipe, *NO_ROOM, *large]) == 0
    out = capsys.readouterr().out
    assert "nothing fits: " in out and "take more or larger GPUs" in out and "accelerate launch" not in out


def test_buckets_are_those_of_ds_configs(recipe, capsys, monkeypatch, tmp_path):
    """Width 32: a bucket of 32 x 32 elements where the files are, DeepSpeed's half a billion where they are not."""
    zero1 = {}
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        assert main(["plan", recipe, *ROOM, "--json"]) == 0
        outlook = json.loads(capsys.readouterr().out)
        zero1[folder] = (
            next(row for row in outlook["rows"] if row["strategy"] == "zero1")["buffers"],
            outlook["buckets_note"],
        )
    largest = 300 * 32  # the embedding, flattened and then in fp32
    assert zero1[ROOT] == (2 * 32 * 32 + (2 + 4) * largest, "")
    assert zero1[tmp_path][0] == (2 + 2 + 4) * 500_000_000
    assert zero1[tmp_path][1].startswith(
        "buckets are of DeepSpeed's own sizes, for want of accelerate_configs/zero1.yaml"
    )


def test_a_recipe_that_checkpoints_is_told_not_to_where_it_need_not(recipe, capsys):
    assert main(["plan", recipe, *ROOM, "train.activation_checkpointing=true"]) == 0
    said = capsys.readouterr().out.rstrip()
    assert said.endswith("train.micro_batch_size=6 train.activation_checkpointing=false")
    assert "train.activation_checkpointing=true is left out of it: it fits without, and computes less" in said


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_other_architectures(recipe, name, capsys):
    settings = [f"model.config.{key}={json.dumps(value)}" for key, value in TINY[name].items() if key != "vocab_size"]
    assert main(["plan", recipe, *ROOM, f"model.type={name}", "model.config={}", *settings, "--json"]) == 0
    outlook = json.loads(capsys.readouterr().out)
    assert outlook["by_formula"] == "" and len(outlook["rows"]) == 14


def test_a_model_that_cannot_be_traced_is_by_formula(recipe, capsys, monkeypatch):
    from clm_dist.planning import activations

    def refuse(*_):
        raise RuntimeError("needs values")

    monkeypatch.setattr(activations, "count", refuse)
    assert main(["plan", recipe, *ROOM]) == 0
    assert (
        "by formula (arXiv:2205.05198), the model cannot be traced: RuntimeError: needs values"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--gpus", "5", "--gpu-memory", "24"], "train.global_batch_size=12 is not divisible by 5 GPUs"),
        (["--gpus", "2", "--gpu-memory", "-3"], "--gpu-memory -3.0 is not possible; give a number above 0"),
        ([*ROOM, "model.config.n_head=5"], "builds no gpt2"),
        ([*ROOM, "model.config.n_lyer=5"], "did you mean n_layer?"),
        ([*ROOM, "data.block_size=65"], "data.block_size=65 exceeds the 64 positions of gpt2"),
        (
            [*ROOM, "model.type=null", "model.name=/nowhere", "model.config={}"],
            "model.name=/nowhere: there is no folder /nowhere, and a name",
        ),
    ],
)
def test_bad_input_is_one_message(recipe, arguments, needle, capsys):
    assert main(["plan", recipe, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("clm-dist plan: error: ") and needle in err and err.count("\n") == 1


@pytest.mark.parametrize("given", [["--gpus", "2"], ["--gpu-memory", "80"]])
def test_both_are_needed(recipe, given, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", recipe, *given])
    assert caught.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err
