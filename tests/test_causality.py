"""The proof that a model sees no later token, and that it refuses what must not train."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from clm_dist.config import ModelConfig
from clm_dist.errors import UserError
from clm_dist.model import repairs, transformers_versions
from clm_dist.model.architectures import BOTH_WRONG, BY_TYPE, FUTURE, GUIDE
from clm_dist.model.build import build_model
from clm_dist.model.causality import check_causality, cuts
from clm_dist.model.configuration import model_configuration
from clm_dist.model.loss import next_token_nll

IDS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None}
MUST_BE_TOLD = [
    row for row in GUIDE
    if row.guide in (FUTURE, BOTH_WRONG) and transformers_versions.MAJOR in row.lives and row.needs and row.repair is None
]  # fmt: skip


def model_of(type_, **settings):
    config = ModelConfig(type=type_, preset="tiny", config=settings)
    model = build_model(config, model_configuration(config, IDS), 0)
    model.config.use_cache = False
    return model


def small_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=50))


def test_the_places_are_odd_and_in_the_block():
    assert cuts(1024) == [205, 513, 1023]
    assert cuts(4) == [1, 3] and cuts(2) == [1]


def test_a_causal_model_passes_and_is_left_as_it_was():
    model = small_gpt2().train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state()
    check_causality(model, 64, "it", next_token_nll)
    assert model.training and torch.get_rng_state().equal(state)
    assert all(one.equal(before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("row", MUST_BE_TOLD, ids=lambda row: row.type)
def test_what_must_be_told_is_refused_untold(row):
    """A decoder flag left off, attention both ways: named with the position and what to set."""
    wrong = {
        key: value
        for key, value in {"is_decoder": False, "causal": False, "attn_type": "bi"}.items()
        if key in row.needs
    }
    model = model_of(row.type, **wrong)
    with pytest.raises(UserError) as caught:
        check_causality(model, 48, row.type, next_token_nll)
    key = next(iter(wrong))
    told = str(row.needs[key]).lower() if isinstance(row.needs[key], bool) else row.needs[key]
    assert f"{row.type} is no left-to-right model: its prediction at position " in str(caught.value)
    assert f"model.config.{key}={told}" in str(caught.value)


def test_an_architecture_without_a_row_is_told_by_its_own_configuration():
    """Gemma 3 can look both ways, if told."""
    if transformers_versions.MAJOR < 5:
        pytest.skip("of transformers 5")
    model = model_of("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UserError, match=r"set model\.config\.use_bidirectional_attention=false"):
        check_causality(model, 48, "it", next_token_nll)


def test_sparse_attention_is_seen_at_the_runs_own_length():
    """BigBird told to be a decoder sees the future all the same, on blocks long enough for its sparse attention."""
    settings = {"attention_type": "block_sparse", "block_size": 8, "num_random_blocks": 1}
    check_causality(model_of("big_bird", **settings), 48, "it", next_token_nll)  # it falls back to full attention
    with pytest.raises(UserError, match=r"model\.config\.attention_type=original_full"):
        check_causality(model_of("big_bird", **settings), 128, "it", next_token_nll)


@pytest.mark.parametrize("name", ["cpmant", "prophetnet"])
def test_without_its_repair_it_is_refused(name, monkeypatch):
    """The library's own code, beside ours."""
    import importlib

    repaired = model_of(name)
    check_causality(repaired, 48, name, next_token_nll)
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    owner, method = {
        "cpmant": ("CpmAntModel", "_prepare_attention_mask"),
        "prophetnet": ("ProphetNetNgramSelfAttention", "get_predict_relative_pos_embeddings"),
    }[name]
    ours = getattr(getattr(module, owner), method)
    import inspect

    source = inspect.getsource(module)
    fresh = type(module)(module.__name__)
    fresh.__dict__.update({key: module.__dict__[key] for key in ("__package__", "__spec__", "__name__")})
    exec(compile(source, module.__file__, "exec"), fresh.__dict__)
    theirs = getattr(getattr(fresh, owner), method)
    assert theirs is not ours
    monkeypatch.setattr(getattr(module, owner), method, theirs)
    with pytest.raises(UserError, match="is no left-to-right model"):
        check_causality(repaired, 48, name, next_token_nll)


def test_reformer_draws_from_the_steps_own_generator():
    """Without the repair two training passes with one seed differ."""
    model = model_of("reformer", hidden_dropout_prob=0.2).train()
    ids = torch.arange(32)[None]

    def logits():
        torch.manual_seed(3)
        return model(input_ids=ids).logits

    assert logits().equal(logits())
    layer = repairs._module("reformer").ReformerLayer
    ours = layer._init_attention_seed

    def theirs(self):
        self.attention_seed = int(torch.seed() % 2**62)
        torch.manual_seed(self.attention_seed)

    layer._init_attention_seed = theirs
    try:
        assert not logits().equal(logits())
    finally:
        layer._init_attention_seed = ours


def leaking_mask(model):
    """Attention to one token further on than it should: the mask moved by one."""
    original = F.scaled_dot_product_attention

    def leaking(query, key, value, attn_mask=None, **options):
        length = query.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool).tril(diagonal=1)
        options.pop("is_causal", None)
        return original(query, key, value, attn_mask=mask, **options)

    return leaking


def test_a_mask_that_leaks_one_token_is_named(monkeypatch):
    model = small_gpt2()
    monkeypatch.setattr(F, "scaled_dot_product_attention", leaking_mask(model))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", leaking_mask(model))
    with pytest.raises(
        UserError, match=r"its prediction at position 1[12] moves by .* when tokens from position 13 on"
    ):
        check_causality(model, 64, "it", next_token_nll)


def unshifted(logits, ids, scored=None):
    """What BART's own loss scores: the token that is given."""
    return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")[:, :-1]


def shifted_twice(logits, ids, scored=None):
    """GIT's in 4.57."""
    return F.cross_entropy(logits[:, :-2].transpose(1, 2), ids[:, 2:], reduction="none")


def shifted_too_far(logits, ids, scored=None):
    """The same, of the right shape."""
    return F.pad(shifted_twice(logits, ids), (0, 1))


@pytest.mark.parametrize("wrong", [unshifted, shifted_twice, shifted_too_far])
def test_the_loss_of_another_token_is_refused(wrong):
    with pytest.raises(UserError, match="it is the loss of another token"):
        check_causality(small_gpt2(), 48, "it", wrong)


def test_logits_that_stand_one_place_further_on_are_refused():
    """As of a model that shifts its inputs itself."""
    model = small_gpt2()
    forward = model.forward
    model.forward = lambda input_ids, **options: forward(input_ids=F.pad(input_ids[:, :-1], (1, 0)), **options)
    with pytest.raises(UserError, match="does not look at the token at position"):
        check_causality(model, 48, "it", next_token_nll)


def test_it_can_be_switched_off_by_name_alone(tmp_path):
    from conftest import recipe_values

    from clm_dist.recipe import build
    from clm_dist.training.proof import prove

    values = recipe_values(tmp_path)
    config = build({**values, "model": {"type": "bert", "preset": "tiny", "config": {"is_decoder": False}}})
    model = model_of("bert", is_decoder=False)
    with pytest.raises(UserError, match=r"model\.config\.is_decoder=true \(model\.check_causality=false"):
        prove(config, model, "bert", torch.device("cpu"))
    prove(
        build({**values, "model": {**config.model.model_dump(), "check_causality": False}}),
        model,
        "bert",
        torch.device("cpu"),
    )


def test_noise_of_experts_is_no_leak():
    """Sums in another order for other tokens: fp64 shows them to be rounding."""
    model = small_gpt2()
    forward = model.forward

    def noisy(input_ids, **options):
        out = forward(input_ids=input_ids, **options)
        out.logits = out.logits + input_ids.float().mean() * torch.finfo(out.logits.dtype).eps
        return out

    model.forward = noisy
    check_causality(model, 48, "it", next_token_nll)
    model.forward = lambda input_ids, **options: forward(input_ids=input_ids, **options)
    assert BY_TYPE["mixtral"].type == "mixtral"


@pytest.mark.parametrize("type_", ["helium", "nemotron", "olmo", "exaone4", "glm", "recurrent_gemma", "qwen2_moe"])
def test_architectures_without_a_row_go_through_the_same_door(type_):
    """By transformers' name, with a preset's sizes, proved like the others."""
    assert type_ not in BY_TYPE
    model = model_of(type_)
    check_causality(model, 48, type_, next_token_nll)
    assert sum(one.numel() for one in model.parameters()) < 1e6


def test_a_model_whose_numbers_are_none_is_not_called_a_leaking_one():
    model = small_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(
        UserError, match="logits that are no finite numbers before its first step; give weights that are"
    ):
        check_causality(model, 48, "it", next_token_nll)
