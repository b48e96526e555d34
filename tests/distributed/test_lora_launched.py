"""The promise: adapters are trained, saved, gone on with to the last bit and merged, alike under every engine, and of the
frozen base no bit changes and no byte is saved.

A base on disk, 6 steps by two processes, saved every 3; a copy whose last checkpoint is taken away goes on from the third.
"""

import functools
import json
import shutil

import pytest
import torch
from conftest import TINY_MODEL, prepare_recipe, read_rows, run_command
from safetensors.torch import load_file, save_file

from clm_dist.checkpoint import content
from clm_dist.checkpoint.folder import Checkpoint
from clm_dist.config import ModelConfig
from clm_dist.model.build import build_model, load_model
from clm_dist.model.configuration import model_configuration
from clm_dist.model.lora import A, B

pytest.importorskip("deepspeed")
pytest.importorskip("peft")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, CUT = 6, 3
ADAPTERS = {f"transformer.h.{i}.attn.c_attn{part}" for i in (0, 1) for part in (A, B)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe with accumulation, dropout of the adapters and clipping, over a base on disk; its data."""
    folder = tmp_path_factory.mktemp("lora")
    plain = ModelConfig(**TINY_MODEL)
    built = model_configuration(plain, {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0})
    model = build_model(plain, built, 7)
    model.save_pretrained(folder / "base")
    return prepare_recipe(
        folder,
        110,
        data={"eval_fraction": 0.05},
        model={"type": None, "config": {}, "name": str(folder / "base"), "lora": {"rank": 4, "dropout": 0.1}},
        optim={"lr": 3e-2, "eps": 1e-6, "max_grad_norm": 0.05},
        train={
            "max_steps": STEPS,
            "global_batch_size": 12,
            "micro_batch_size": 2,
            "log_every": 1,
            "compare_ranks_every": 1,
        },
        checkpoint={"save_every": CUT, "keep_last": 9},
        evaluate={"every_steps": 3},
    )


@pytest.fixture(scope="module")
def go_on(launch_warm):
    """Begins a run, or goes on with it; returns what it said."""

    def launched(recipe, run, config, processes):
        done = launch_warm(processes, "train", recipe, f"run_dir={run}", config=config)
        assert done.code == 0, done.err
        return done.out

    return launched


@pytest.fixture(scope="module")
def run_of(recipe, go_on):
    """run_of(config) -> the folder of a run by two processes that nothing interrupted; one each."""

    @functools.cache
    def launched(config):
        run = recipe.parent / config
        go_on(recipe, run, config, 2)
        return run

    return launched


def copy_until(run, step, place):
    """The run as it was after a step."""
    shutil.copytree(run, place)
    for path in (place / "checkpoints").glob("step-*"):
        if Checkpoint(path).step > step:
            shutil.rmtree(path)
    return place


def saved(run, step=STEPS):
    """Everything of a checkpoint, by kind and name."""
    checkpoint = Checkpoint(run / "checkpoints" / f"step-{step:08d}")
    kinds = {kind: content.read(checkpoint, kind) for kind in ("model", "optimizer")}
    return {
        f"{kind} {name}": one.read(name, 0, one.numel(name))
        for kind, one in kinds.items()
        for name in sorted(one.names())
    }


def losses(run):
    return [row["train/loss"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]


ENGINES = ["ddp", "zero3", *(pytest.param(one, marks=pytest.mark.soak) for one in ("zero2", "fsdp2"))]


@pytest.mark.parametrize("config", ENGINES)
def test_what_a_run_leaves(recipe, run_of, config):
    """Shown to fail: with `freeze` undone after `adapt` (other names in the checkpoint, another base in the export); with
    adapters left out of checkpoints (`given` of all names); with merging in place (the second export adds B A once more)."""
    run, base = run_of(config), load_file(recipe.parent / "base" / "model.safetensors")
    held = saved(run)
    assert {name.removeprefix("model ") for name in held if name.startswith("model ")} == ADAPTERS
    assert {name.partition(".")[2] for name in held if name.startswith("optimizer ")} == ADAPTERS
    merged = load_file(run / "model" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert merged.keys() == base.keys()
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)}
    adapter = load_file(run / "model" / "adapter" / "adapter_model.safetensors")
    for i in (0, 1):  # by hand: alpha / rank = 4; c_attn is stored as (in, out)
        name = f"transformer.h.{i}.attn.c_attn"
        a, b = (held[f"model {name}{part}"] for part in (A, B))
        assert b.any()
        torch.testing.assert_close(adapter[f"base_model.model.{name}.lora_A.weight"].view(-1), a, rtol=0, atol=0)
        product = 4 * b.view(-1, 4).double() @ a.view(4, -1).double()
        off = merged[f"{name}.weight"].double() - base[f"{name}.weight"].double() - product.T
        assert off.abs().max() < 1e-7
    sums = {Checkpoint(path).state()["base_sha256"] for path in (run / "checkpoints").glob("step-*")}
    assert len(sums) == 1 and len(next(iter(sums))) == 64


@pytest.mark.parametrize("config", ENGINES[1:])
def test_engines_agree(run_of, config):
    """With DDP: losses of every step to 1e-6; adapters at the end to 1e-4 of the largest."""
    one, other = run_of("ddp"), run_of(config)
    assert losses(other) == pytest.approx(losses(one), rel=1e-6) and len(losses(one)) == STEPS
    for name, tensor in saved(one).items():
        if name.startswith("model "):
            found = saved(other)[name]
            assert (found - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


@pytest.mark.parametrize(
    "config", ["zero3", *(pytest.param(one, marks=pytest.mark.soak) for one in ("ddp", "zero2", "fsdp2"))]
)
def test_going_on_to_the_last_bit(recipe, run_of, go_on, tmp_path, config):
    whole, run = run_of(config), copy_until(run_of(config), CUT, tmp_path / "run")
    assert f"resumed at step {CUT}" in go_on(recipe, run, config, 2)
    found, expected = saved(run), saved(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (run / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name


def test_two_processes_then_one_over_that_base_only(recipe, run_of, go_on, tmp_path):
    """From ZeRO-3's checkpoint by one plain process; over a base of which one value is another it is refused, and nothing
    is written. Shown to fail where the hash is not compared."""
    whole = run_of("zero3")
    run = copy_until(whole, CUT, tmp_path / "run")
    weights = recipe.parent / "base" / "model.safetensors"
    original = weights.read_bytes()
    changed = load_file(weights)
    changed["transformer.wpe.weight"][63, 0] += 1  # of a position that no block has
    save_file(changed, weights, metadata={"format": "pt"})
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    done = run_command("train", recipe, f"run_dir={run}", env={"OMP_NUM_THREADS": "1"})
    weights.write_bytes(original)
    assert done.code == 2 and "holds adapters beside other frozen weights (sha256 " in done.err, done.err
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    go_on(recipe, run, "ddp", 1)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)


def test_what_others_read(recipe, run_of):
    """transformers reads the merged model, peft the adapter beside the base: the same logits."""
    from peft import PeftModel

    run, base = run_of("zero3"), recipe.parent / "base"
    merged = load_model(str(run / "model")).eval()
    adapted = PeftModel.from_pretrained(load_model(str(base)), str(run / "model" / "adapter")).eval()
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (merged, adapted))
        plain = load_model(str(base)).eval()(input_ids=ids).logits
    assert (one - other).abs().max() < 1e-5 * other.abs().max() and (one - plain).abs().max() > 1e-3
    settings = json.loads((run / "model" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (4, 16, ["c_attn"])
    assert settings["base_model_name_or_path"] == "base" and settings["fan_in_fan_out"] is True
    card = (run / "model" / "README.md").read_text()
    assert "LoRA adapters of rank 4 (alpha 16) at c_attn (1,024 parameters) were trained" in card and "- lora" in card
