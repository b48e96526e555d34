"""Adapters: where they go, that nothing else is trained, what merging makes of them, and what is said of mistakes.

What processes do with them together is in distributed/test_lora_launched.py, what each architecture does in lora_rows.py.
"""

import pytest
import torch
from conftest import recipe_values
from lora_rows import IDS, apart, build, draw_b, verdict
from tiny_models import TINY

from clm_dist import recipe, versions
from clm_dist.checkpoint.content import weights
from clm_dist.config import LoraConfig, ModelConfig
from clm_dist.errors import ConfigError, UserError
from clm_dist.model import lora
from clm_dist.model.architectures import BY_TYPE
from clm_dist.model.configuration import model_configuration
from clm_dist.planning.estimate import flops_per_token
from clm_dist.planning.memory import ModelState, Strategy, by_paper, model_state
from clm_dist.planning.shapes import shapes
from clm_dist.publish.hub_queue import allowed, is_weights
from clm_dist.training.job import open_job

pytest.importorskip("peft")

IDS_OF_TEXT = torch.randint(2, 100, (2, 16), generator=torch.Generator().manual_seed(3))


def of(type_="gpt2", **settings):
    return ModelConfig(type=type_, config=TINY[type_], lora=LoraConfig(**settings))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_same_adapter_at_every_start():
    """By the seed alone: whatever random numbers came before, as they do on ranks. Shown to fail with the two lines that
    fork and seed the generator taken out of `adapt`."""
    torch.manual_seed(1)
    one = state(build(of(), 5))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(one, state(build(of(), 5))) and torch.equal(before, torch.get_rng_state())
    other = state(build(of(), 6))
    names = [name for name in one if name.endswith(lora.A)]
    assert len(names) == 2 and not any(torch.equal(one[name], other[name]) for name in names)


def test_only_adapters_are_trained_and_the_model_computes_what_it_did():
    model, plain = build(of(rank=3), 5), build(of().model_copy(update={"lora": None}), 5)
    trained = {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {  # c_attn is (33, 99), stored as (in, out)
        f"transformer.h.{i}.attn.c_attn{part}": shape
        for i in (0, 1)
        for part, shape in ((lora.A, (3, 33)), (lora.B, (99, 3)))
    }
    assert type(model) is type(plain) and apart(model, plain, IDS_OF_TEXT) == 0
    assert lora.given(plain) == frozenset() and lora.adapters(plain) == {}
    assert set(weights(model, lora.given(model))) == set(trained)


@pytest.mark.parametrize(
    ("type_", "wanted", "found"),
    [
        ("gpt2", None, ["transformer.h.*.attn.c_attn"]),  # peft's choices
        ("llama", None, ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"]),
        (
            "gpt2",
            "all-linear",
            [f"transformer.h.*.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
        ),
        ("gpt2", ["mlp.c_proj"], ["transformer.h.*.mlp.c_proj"]),  # and not attention's
        ("llama", ["lm_head"], ["lm_head"]),
        ("opt", ["layers.*.fc1"], ["model.decoder.layers.*.fc1"]),
    ],
)
def test_where_adapters_go(type_, wanted, found):
    assert sorted(lora.kinds(lora.adapters(build(of(type_, target_modules=wanted), 0)))) == found


def test_one_block_alone():
    assert list(lora.adapters(build(of(target_modules="h.1.attn.c_attn"), 0))) == ["transformer.h.1.attn.c_attn"]


def test_an_architecture_that_peft_does_not_know_gets_all_but_the_head():
    config = ModelConfig(type="olmo2", preset="tiny", lora=LoraConfig())
    ends = {name.rpartition(".")[2] for name in lora.adapters(build(config, 0))}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_layers_that_no_text_reaches_get_none():
    """A decoder's attention to an encoder that is not there."""
    config = ModelConfig(type="bart", preset="tiny", lora=LoraConfig(target_modules=["q_proj"]))
    assert lora.kinds(lora.adapters(build(config, 0))) == ["model.decoder.layers.*.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        (
            {"target_modules": ["c_attn", "q_proj"]},
            "q_proj is no linear layer of GPT2LMHeadModel, which has transformer.h.*.attn.c_attn, transformer.h.*.attn.c_",
        ),
        ({"target_modules": ["lm_head"]}, "lm_head shares its weights with another layer or the embedding"),
        ({"target_modules": ["wte"]}, "wte is no linear layer"),
    ],
)
def test_layers_that_there_are_not(settings, needle):
    with pytest.raises(UserError) as raised:
        build(of(**settings), 0)
    assert needle in str(raised.value)


def test_an_adapter_that_would_do_nothing_is_refused():
    """Jamba's dt_proj is read past the layer: its adapter would never have a gradient, and DDP would wait for one."""
    row = BY_TYPE["jamba"]
    said = verdict(row, LoraConfig(target_modules=["dt_proj", "in_proj"]))
    assert "reads the weights of model.layers.*.mamba.dt_proj past the layer" in said
    assert said.endswith("set model.lora.target_modules=[model.layers.*.mamba.in_proj]")
    assert verdict(row, LoraConfig(target_modules=["model.layers.*.mamba.in_proj"])) == "yes"


@pytest.mark.parametrize(
    ("type_", "settings"),
    [
        ("gpt2", {"target_modules": "all-linear"}),  # stored as (in, out); a tied head
        ("llama", {"target_modules": ["q_proj", "lm_head"], "rslora": True}),
        ("gpt_neox", {"rank": 2, "alpha": 5}),
    ],
)
def test_merged_weights_are_those_that_peft_makes(type_, settings):
    """And no bit of the live ones is another. Shown to fail with peft's own `merge_adapter`, which adds in place."""
    model = build(of(type_, **settings), 4)
    draw_b(model)
    before = state(model)
    merged = lora.merged(model, dict(model.state_dict()))
    assert same(before, state(model))
    plain = build(of(type_).model_copy(update={"lora": None}), 9)
    assert plain.load_state_dict(merged) and apart(model, plain, IDS_OF_TEXT) < 1e-5
    for layer in lora.adapters(model).values():
        layer.merge()
    for name, layer in lora.adapters(model).items():
        torch.testing.assert_close(merged[f"{name}.weight"], layer.get_base_layer().weight, rtol=0, atol=1e-7)
    assert not same(before, state(model))


def test_the_hash_of_the_base():
    """Knows one bit of the base, and nothing of the adapters."""
    sums = [lora.base_sha256(build(of(rank=rank), 5)) for rank in (2, 2, 3)]
    assert len(set(sums)) == 1
    model = build(of(), 5)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.view(torch.int32)[0, 0] ^= 1
    assert lora.base_sha256(model) != sums[0]


@pytest.mark.parametrize("type_", ["mamba2", "mixtral", "reformer", "musicgen", "deepseek_v3", "cpmant"])
def test_odd_architectures(type_):
    """State spaces, experts that are one tensor, a backward pass of its own, a head that is no head to transformers."""
    assert verdict(BY_TYPE[type_]) == "yes"


def test_the_recipe(tmp_path):
    def problems(**model):
        with pytest.raises(ConfigError) as raised:
            recipe.build(recipe_values(tmp_path, **model))
        return str(raised.value)

    assert "unknown key model.lora.rnak; did you mean model.lora.rank?" in problems(model={"lora": {"rnak": 4}})
    assert "model.lora.rank=0: " in problems(model={"lora": {"rank": 0}})
    assert "model.lora.dropout=1.5: " in problems(model={"lora": {"dropout": 1.5}})
    assert "set train.mixed_precision=bf16" in problems(model={"lora": {}}, train={"mixed_precision": "fp8"})
    values = recipe_values(tmp_path)
    assert recipe.override(values, "model.lora.target_modules=c_attn") is None
    config = recipe.build(values)
    assert config.model.lora == LoraConfig(target_modules=("c_attn",)) and config.model.lora.rank == 8
    flat = recipe.flat(config)
    assert flat["model.lora.alpha"] == 16 and flat["model.lora.target_modules"] == '["c_attn"]'
    assert "  model.lora.rank  (int, >= 1, default 8)" in recipe.help_text()


def test_without_peft(tmp_path, monkeypatch):
    """Said before the data is looked for."""
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'clm-dist\[lora\]'"):
        open_job(recipe.build(recipe_values(tmp_path, model={"lora": {}})), overwrite=False)


def test_what_a_plan_counts():
    """GPT-2 of two layers, width 33: of c_attn, 33 x 99, adapters of rank 4 have 4 x (33 + 99) weights in each layer."""
    config = of(rank=4)
    whole = shapes(config.model_copy(update={"lora": None}), model_configuration(config, IDS))
    found = shapes(config, model_configuration(config, IDS))
    assert found.trained == 2 * 4 * (33 + 99) and found.vectors == () and len(found.matrices) == 4
    assert sum(found.frozen) == whole.trained == found.parameters - found.trained
    parameters, trained = found.parameters, found.trained
    assert model_state(found, Strategy("ddp", 0), 2, mixed=False) == ModelState(
        4 * parameters, 4 * trained, 8 * trained + 4 * 4
    )
    # 16-bit weights of all; a group of 1056 for two ranks: fp32 gradients, weights and moments of 528
    assert model_state(found, Strategy("zero2", 2), 2, mixed=True) == ModelState(2 * parameters, 4 * 528, 12 * 528 + 4)
    assert by_paper(1000, 3, 2, frozen=500) == 1000 * 8 + 500
    attention = 4 * 2 * 33 * 16
    assert flops_per_token(found, 16, False) == 3 * (2 * trained + attention) + 4 * whole.parameters
    assert flops_per_token(whole, 16, False) == 3 * (2 * whole.parameters + attention)


def test_what_the_hub_gets():
    assert allowed("adapter/adapter_config.json") and allowed("adapter/adapter_model.safetensors")
    assert is_weights("adapter/adapter_model.safetensors")  # a model that is trained whole takes its place, and it goes
    assert not allowed("adapter/other.safetensors")
