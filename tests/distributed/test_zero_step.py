"""A step that is withheld leaves no trace in weights, masters, moments or gradients, at every stage of ZeRO (engines.py)."""

from pathlib import Path

import pytest
from conftest import launch, prepare_recipe

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2"])
def test_a_withheld_step_leaves_no_trace(tmp_path, config):
    train = {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 3, "mixed_precision": "no"}
    recipe = prepare_recipe(tmp_path, 40, train=train, optim={"max_grad_norm": 0.5})
    script = Path(__file__).parent / "engines.py"
    done = launch(2, "withheld", recipe, tmp_path, script=script, config=config)
    assert done.code == 0, done.err
