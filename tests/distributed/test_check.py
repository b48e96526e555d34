"""`clm-dist check`: launches that keep their promises pass, and each broken one is named."""

from pathlib import Path

import pytest
from conftest import ROOT, prepare_recipe

pytestmark = pytest.mark.distributed

# idiom -> the first promise that it breaks
BROKEN = {
    "accumulation_steps_only": "gradient norm",
    "all_tokens_count": "loss",
    "scheduler_of_each_process": "learning rate",
    "clipping_left_to_auto": "clipped gradients",
    "data_of_another_rank": "blocks",
}
BY_ZERO = {"accumulation_steps_only", "clipping_left_to_auto"}  # which DeepSpeed divides and clips for; in CI
ENGINES = ["ddp", "zero3", "fsdp2"]
ENGINES += [pytest.param(one, marks=pytest.mark.soak) for one in ("zero1", "zero2", "zero3_offload")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Documents packed whole: micro-batches have different numbers of scored tokens. Every step clips."""
    folder = tmp_path_factory.mktemp("check")
    return prepare_recipe(
        folder,
        150,
        data={"packing": "best_fit", "block_size": 48},
        optim={"lr": 3e-3, "max_grad_norm": 0.2, "schedule": "linear"},
        train={"max_steps": 20, "global_batch_size": 12, "micro_batch_size": 2},
    )


@pytest.fixture
def check(launch_warm):
    """check(recipe, engine, *overrides, broken) -> how `clm-dist check` ended on two processes."""

    def checked(recipe, engine, *overrides, broken=None):
        script = Path(__file__).parent / "broken.py"
        env = {"CLM_DIST_ACCUMULATION": "3"} | ({"CLM_DIST_BREAK": broken} if broken else {})
        return launch_warm(2, "check", recipe, *overrides, script=script, env=env, config=engine)

    return checked


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_launches_that_keep_their_promises(check, recipe, engine):
    """With the checkpointing of activations that tells operations apart."""
    done = check(recipe, engine, "train.activation_checkpointing=selective")
    assert done.code == 0, done.err
    assert "all promises kept over 3 steps" in done.out and "DIFFERS" not in done.out
    assert not (recipe.parent / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", pytest.param("fsdp2", marks=pytest.mark.soak)])
def test_a_parameter_that_gets_no_gradient(check, recipe, engine):
    """XLNet has one for masked tokens, of which there are none here: ZeRO has moments for it, plain torch has not."""
    small = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "dropout": 0.0}
    done = check(recipe, engine, "model.type=xlnet", f"model.config={small}", "train.isolate_documents=false")
    assert done.code == 0 and "all promises kept" in done.out, done.out + done.err


@pytest.mark.parametrize("precision", ["bf16"])
@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(one, marks=pytest.mark.soak) for one in ("zero2", "zero3"))])
@pytest.mark.slow
def test_low_precision_too(check, recipe, engine, precision):
    done = check(recipe, engine, f"train.mixed_precision={precision}", "train.activation_checkpointing=true")
    assert done.code == 0 and "all promises kept" in done.out, done.out + done.err


def test_one_process_without_a_launcher(command, recipe):
    done = command("check", recipe)
    assert done.code == 0 and "one process" in done.out, done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["ddp", "zero3", *(pytest.param(one, marks=pytest.mark.soak) for one in ("zero1", "zero2"))]
)
def test_the_demo(check, command, tmp_path_factory, engine):
    """As it is shipped, dropout and all."""
    prepared = tmp_path_factory.getbasetemp() / "demo-prepared"
    overrides = [f"data.prepared_dir={prepared}"]
    assert command("prepare", ROOT / "recipes" / "demo.yaml", *overrides).code == 0
    done = check(ROOT / "recipes" / "demo.yaml", engine, *overrides)
    assert done.code == 0 and "all promises kept" in done.out, done.out + done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "engine"),
    [
        pytest.param(broken, engine, marks=() if (engine == "zero2") == (broken in BY_ZERO) else pytest.mark.soak)
        for broken in BROKEN
        for engine in ("ddp", "zero2")
    ],
)
def test_broken_promises_are_named(check, recipe, broken, engine):
    done = check(recipe, engine, broken=broken)
    assert done.code != 0, done.out
    assert f"broken: {BROKEN[broken]} (step" in done.err, done.out + done.err
