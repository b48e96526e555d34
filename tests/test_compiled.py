"""torch.compile of blocks: names stay, evaluation is as without, and where it is not used it says why."""

import pytest
import torch

from clm_dist.config import Config
from clm_dist.config.learning import ModelConfig, TrainConfig
from clm_dist.errors import UserError
from clm_dist.model import compiled
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration


def tiny(type_="gpt2"):
    given = ModelConfig(type=type_, preset="tiny", config={"vocab_size": 100, "n_layer": 3})
    model = build_model(given, model_configuration(given, {}), seed=0)
    model.config.use_cache = False
    return model


def counted(monkeypatch):
    """Compiles without a compiler of C, and notes each call of a compiled block."""
    calls, real = [], torch.compile

    def compile_(function, **settings):
        fast = real(function, backend="aot_eager", **settings)

        def noted(*args, **kwargs):
            calls.append(1)
            return fast(*args, **kwargs)

        return noted

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


def test_blocks_are_compiled_while_training_only(monkeypatch):
    torch._dynamo.reset()
    model, ids = tiny(), torch.arange(20)[None]
    names = list(model.state_dict())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
    calls = counted(monkeypatch)
    assert compiled.compile_blocks(model, deterministic=False) == 3
    assert list(model.state_dict()) == names
    with torch.no_grad():
        assert model.eval()(input_ids=ids).logits.equal(wanted) and not calls
    found = model.train()(input_ids=ids).logits
    assert len(calls) == 3 and torch.allclose(found, wanted, atol=1e-5)
    found.sum().backward()
    assert all(one.grad is not None for one in model.parameters())


def test_all_blocks_share_one_graph(monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    counted(monkeypatch)
    model = tiny().train()
    compiled.compile_blocks(model, deterministic=False)
    for _ in range(2):
        model(input_ids=torch.arange(20)[None]).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_where_it_does_not_pay_it_says_why(monkeypatch):
    model = tiny()
    assert "no GPU" in compiled.why_not(model, "cpu", "replicated")
    assert "DeepSpeed" in compiled.why_not(model, "cuda", "zero")
    monkeypatch.setattr(compiled, "can_compile", lambda: False)
    assert "C compiler" in compiled.why_not(model, "cuda", "replicated")
    monkeypatch.setattr(compiled, "can_compile", lambda: True)
    assert compiled.why_not(model, "cuda", "replicated") is None
    monkeypatch.setattr(compiled, "recorded", lambda major: {"rows": {"gpt2": {"compile": "no: it cannot"}}})
    assert compiled.why_not(model, "cuda", "replicated") == "gpt2: it cannot"


def test_without_blocks_on_is_refused(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model, "_no_split_modules", None)
    train = TrainConfig(max_steps=1, compile="on")
    with pytest.raises(UserError, match=r"does not say which they are; set train\.compile=auto"):
        compiled.compile_if_asked(train, model, "cpu", "replicated")
    assert compiled.compile_if_asked(TrainConfig(max_steps=1), model, "cpu", "replicated") is None


def test_on_and_off_are_words_in_yaml_too(tmp_path):
    train = {"max_steps": 1}
    model, data = {"type": "gpt2"}, {"source": "a.jsonl", "prepared_dir": str(tmp_path)}
    for given, meant in ((True, "on"), (False, "off"), ("auto", "auto")):
        config = Config(run_dir="r", model=model, data=data, train={**train, "compile": given})
        assert config.train.compile == meant


def test_selective_checkpointing_leaves_blocks_as_they_are(monkeypatch):
    monkeypatch.setattr(compiled, "can_compile", lambda: True)
    wish = {"activation_checkpointing": "selective", "max_steps": 1}
    told = compiled.compile_if_asked(TrainConfig(**wish), tiny(), "cuda", "replicated")
    assert told.startswith("train.compile=auto is off: train.activation_checkpointing=selective tells")
    assert compiled.compile_if_asked(TrainConfig(**wish), tiny(), "cpu", "replicated") is None
