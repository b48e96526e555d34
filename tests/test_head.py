"""A model's head made to give its loss: of every architecture the same numbers as from its whole logits, or not used."""

import pytest
import torch
from torch import nn

from clm_dist.config import ModelConfig
from clm_dist.errors import RunError
from clm_dist.model import chunks
from clm_dist.model.architectures import BY_TYPE
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration
from clm_dist.model.head import Head, UnknownHeadError, find_head
from clm_dist.model.loss import next_token_nll
from clm_dist.model.objective import Objective, find_objective
from clm_dist.model.transformers_versions import MAJOR

VOCABULARY = 300
# Several of one kind of each head: tied and not, with and without bias, behind a transform, scaled, bent, of experts,
# recurrent. tests/architectures looks at all of them.
FAMILIES = ["gpt2", "llama", "bert", "bart", "gptj", "xlnet", "rwkv", "mpt", "reformer", "xlm"]
FAMILIES += ["gemma2", "cohere2", "granite", "mixtral", "mamba", "phi"]
WHOLE = {"musicgen": "ModuleList", "prophetnet": "not a vector for each token"}
IDS = torch.randint(5, 290, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "ELEMENTS_ON_CPU", VOCABULARY * 24)


def tiny(type_, **config):
    given = ModelConfig(type=type_, preset="tiny", config={"vocab_size": VOCABULARY, **config})
    model = build_model(given, model_configuration(given, {}), seed=0)
    model.config.use_cache = False
    return model.train()


def learned(model, loss):
    """The loss with dropout drawn from one seed, and its gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    found = loss()
    found.backward()
    return found.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("type_", [one for one in FAMILIES if MAJOR in BY_TYPE[one].lives])
def test_loss_and_gradients_are_those_of_whole_logits(type_):
    model = tiny(type_)
    before = model.state_dict()
    wanted, gradients = learned(model, lambda: next_token_nll(model(input_ids=IDS).logits, IDS).sum())
    objective = find_objective(model)
    assert objective.head is not None and list(model.state_dict()) == list(before)
    loss, found = learned(model, lambda: objective.summed(model, {"input_ids": IDS}))
    assert loss == pytest.approx(wanted, rel=1e-6)
    size = torch.stack([one.square().sum() for one in gradients.values()]).sum().sqrt()
    assert found.keys() == gradients.keys()
    off = torch.stack([(found[name] - one).square().sum() for name, one in gradients.items()]).sum().sqrt()
    assert off <= 1e-6 * size


def test_evaluation_is_that_of_whole_logits():
    """Sums over many tokens, in fp64, within 1e-9."""
    model = tiny("gpt2", n_positions=64).eval()
    ids = torch.randint(VOCABULARY, (40, 64), generator=torch.Generator().manual_seed(0))
    scored = torch.rand(40, 63, generator=torch.Generator().manual_seed(1)) < 0.7
    with torch.no_grad():
        (nll, correct), (whole, other) = (
            one.each(model, {"input_ids": ids}, scored) for one in (find_objective(model), Objective())
        )
    assert nll.double().sum().item() == pytest.approx(whole.double().sum().item(), rel=1e-9)
    assert (correct & scored).equal(other & scored) and nll.shape == whole.shape


@pytest.mark.parametrize("type_", WHOLE)
def test_heads_of_another_kind_are_left_alone(type_):
    model = tiny(type_)
    objective = find_objective(model)
    assert objective.head is None and WHOLE[type_] in objective.why
    with torch.no_grad():
        assert model(input_ids=IDS).logits.shape == (*IDS.shape, model.config.vocab_size)


def test_a_head_with_adapters_is_left_alone():
    pytest.importorskip("peft")
    given = ModelConfig(
        type="llama", preset="tiny", config={"vocab_size": VOCABULARY}, lora={"rank": 2, "target_modules": ["lm_head"]}
    )
    objective = find_objective(build_model(given, model_configuration(given, {}), seed=0))
    assert objective.head is None and "no plain linear layer" in objective.why


class Odd(nn.Module):
    """A model that does something to its logits."""

    def __init__(self, change):
        super().__init__()
        self.inside, self.change = tiny("gpt2"), change
        self.config, self.get_output_embeddings = self.inside.config, self.inside.get_output_embeddings

    def forward(self, **inputs):
        out = self.inside(**inputs)
        out.logits = self.change(out.logits)
        return out


CHANGES = {
    "a shift is unknown": lambda logits: logits + 1,
    "a power is unknown": lambda logits: logits**3,
    "other places are unknown": lambda logits: logits[:, :-1],
    "a negative scale is unknown": lambda logits: -logits,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_known_is_not_used(name):
    model = Odd(CHANGES[name])
    objective = find_objective(model)
    assert objective.head is None and objective.why
    assert model.inside(input_ids=IDS).logits.shape == (*IDS.shape, VOCABULARY)  # the layer is as it was


def test_a_scale_is_found():
    assert find_head(Odd(lambda logits: logits * 0.5)).scale == pytest.approx(0.5)


def test_a_wrong_head_is_found_out(monkeypatch):
    """The proof is no formality: a loss that is a thousandth off is not used."""
    right = chunks._learner
    monkeypatch.setattr(chunks, "_learner", lambda device: lambda *arguments: right(device)(*arguments) * 1.001)
    objective = find_objective(tiny("gpt2"))
    assert objective.head is None and "its loss by chunks is" in objective.why


def test_a_loss_in_another_type_is_refused():
    """What casts logits to 16 bits would round the gradients of everything."""
    model = tiny("gpt2")
    head = find_head(model)
    odd = Odd(lambda logits: logits.bfloat16())
    odd.inside = model
    with pytest.raises(RunError, match=r"as torch.bfloat16 .* set train.chunked_loss=false"):
        head.summed(odd, {"input_ids": IDS}, IDS)


def test_a_head_that_is_asked_for_nothing_gives_logits():
    model = tiny("gpt2").eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        Head(model)
        assert model(input_ids=IDS).logits.equal(before)


def test_random_numbers_and_mode_stay():
    model = tiny("gpt2")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    find_head(model)
    assert torch.rand(3).equal(wanted) and model.training


def test_an_unknown_head_says_why():
    with pytest.raises(UnknownHeadError, match="no plain linear layer but ModuleList"):
        Head(tiny("musicgen"))


def test_a_model_of_few_positions_is_proved_with_as_many():
    assert find_objective(tiny("gpt2", n_positions=8)).head is not None


def test_whatever_a_model_says_its_logits_are_whole_then():
    def breaks(logits):
        raise IndexError("out of range") if logits.shape[-1] != VOCABULARY else KeyError("odd")

    objective = find_objective(Odd(breaks))
    assert objective.head is None and "out of range" in objective.why
