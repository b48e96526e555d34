"""Models by name and from scratch, and what is refused."""

import pytest
import torch

from clm_dist.config import ModelConfig
from clm_dist.errors import ConfigError, UserError
from clm_dist.model.build import build_model, load_model
from clm_dist.model.configuration import model_configuration
from clm_dist.model.positions import check_fits, max_positions

IDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}


def test_from_scratch_takes_the_tokenizers_vocabulary_and_special_tokens():
    built = model_configuration(ModelConfig(type="gpt2", config=SMALL), IDS)
    assert (built.vocab_size, built.eos_token_id, built.n_layer, built.num_hidden_layers) == (300, 0, 1, 1)
    assert model_configuration(ModelConfig(type="gpt2", config={**SMALL, "vocab_size": 512}), IDS).vocab_size == 512


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    config = ModelConfig(type="gpt2", config=SMALL)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    a, b, c = (build_model(config, model_configuration(config, IDS), seed).state_dict() for seed in (5, 5, 6))
    assert torch.rand(1) == expected
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])
    assert {tensor.dtype for tensor in a.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        (ModelConfig(type="gpt-2"), r"model.type=gpt-2 is no causal language model.*did you mean gpt2\?"),
        (
            ModelConfig(type="gpt2", config={"n_layers": 3}),
            r"unknown key model.config.n_layers; did you mean n_layer\?",
        ),
        (
            ModelConfig(name="no/such/folder"),
            "model.name=no/such/folder: there is no folder no/such/folder, and a name on the Hub is written owner/name",
        ),
    ],
)
def test_refusals(config, needle):
    with pytest.raises(UserError, match=needle):
        model_configuration(config, IDS)


def test_positions_and_vocabulary_at_once():
    built = model_configuration(ModelConfig(type="gpt2", config=SMALL), IDS)
    assert max_positions(built) == 32
    check_fits(built, 32, 300, "it")
    with pytest.raises(ConfigError) as caught:
        check_fits(built, 33, 301, "it")
    first, second = caught.value.problems
    assert first.startswith("data.block_size=33 exceeds the 32 positions of it; set data.block_size=32")
    assert second.startswith("the tokenizer has 301 tokens, the embedding of it only 300")


def test_a_folder_without_weights(tmp_path):
    built = model_configuration(ModelConfig(type="gpt2", config=SMALL), IDS)
    built.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no weights.*set model.from_scratch=true"):
        load_model(str(tmp_path))
    config = ModelConfig(name=str(tmp_path), from_scratch=True)
    model = build_model(config, model_configuration(config, IDS), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


def test_half_a_model_is_refused(tmp_path):
    """transformers would draw what is missing at random, in every process anew."""
    from safetensors.torch import load_file, save_file

    config = ModelConfig(type="gpt2", config=SMALL)
    build_model(config, model_configuration(config, IDS), 0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the weights of GPT2LMHeadModel \(transformer.h.0.mlp.c_fc.weight"):
        load_model(str(tmp_path))


def test_weights_saved_in_half_precision_are_trained_in_single(tmp_path):
    config = ModelConfig(type="gpt2", config=SMALL)
    build_model(config, model_configuration(config, IDS), 0).half().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32
