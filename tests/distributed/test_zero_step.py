"""A step that is withheld leaves no trace in weights, masters, moments or gradients, at every stage of ZeRO (engines.py)."""

from pathlib import Path

import pytest
from conftest import TINY_MODEL, prepare_recipe

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


# whose sinusoidal positions are parameters that nobody updates: stage 3 shards them all the same
PEGASUS = {
    "type": "pegasus",
    "config": {
        "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "dropout": 0.0,
        "max_position_embeddings": 64, "is_decoder": True, "is_encoder_decoder": False,
    },
}  # fmt: skip
CASES = [("zero2", TINY_MODEL), ("fsdp2", TINY_MODEL), ("zero3", PEGASUS)]
CASES += [
    pytest.param(name, TINY_MODEL, marks=pytest.mark.soak)
    for name in ("zero1", "zero3", "zero2_offload", "zero3_offload")
]


@pytest.mark.parametrize(
    ("config", "model"),
    CASES,
    ids=lambda value: value["type"] if isinstance(value, dict) else value,
)
def test_a_withheld_step_leaves_no_trace(launch_warm, tmp_path, config, model):
    train = {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 3, "mixed_precision": "no"}
    recipe = prepare_recipe(tmp_path, 40, train=train, optim={"max_grad_norm": 0.5}, model=model)
    script = Path(__file__).parent / "engines.py"
    done = launch_warm(2, "withheld", recipe, tmp_path, script=script, config=config)
    assert done.code == 0, done.err
