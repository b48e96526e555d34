"""What the tests of DeepSpeed configurations share: one recipe, and what becomes of a configuration under it."""

import pytest
from conftest import ROOT, recipe_values

from clm_dist import recipe
from clm_dist.errors import ConfigError
from clm_dist.planning.deepspeed_config import resolve
from clm_dist.planning.deepspeed_launch import read

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
GATHER = "stage3_gather_16bit_weights_on_model_save"


def config(tmp_path, precision="no", norm=1.0, lr=0.01):
    """12 sequences a step: on 2 processes of 3 sequences, 2 micro-steps."""
    train = {"mixed_precision": precision, "micro_batch_size": 3}
    return recipe.build(recipe_values(tmp_path, train=train, optim={"max_grad_norm": norm, "lr": lr}))


def resolved(values, tmp_path, hidden_size=32, device="cuda", **options):
    where = {"world_size": 2, "micro_batch_size": 3, "gradient_accumulation_steps": 2}
    return resolve(values, "ds.json", config(tmp_path, **options), hidden_size=hidden_size, device=device, **where)


def refused(values, tmp_path, **options):
    with pytest.raises(ConfigError) as caught:
        resolved(values, tmp_path, **options)
    return caught.value.problems


def stage(number, **zero):
    return {"zero_optimization": {"stage": number, **zero}}


def two(**top):
    return {**stage(2), **top}


def with_key(path, value):
    values = stage(3)
    *sections, key = path.split(".")
    section = values
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    return values


def shipped(name, tmp_path):
    """A file of ds_configs/, resolved."""
    return resolved(read(str(ROOT / "ds_configs" / f"{name}.json")), tmp_path)
