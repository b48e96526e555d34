"""`check`, without processes: what it compares with."""

from conftest import TINY_MODEL

from clm_dist.config import ModelConfig
from clm_dist.model.build import build_model, model_configuration
from clm_dist.training.check import _without_dropout


def test_without_dropout():
    """Every probability is 0, of a model whose configuration calls them by several names; the given one stays."""
    rates = {"attn_pdrop": 0.1, "embd_pdrop": 0.2, "resid_pdrop": 0.3}
    config = ModelConfig(**{**TINY_MODEL, "config": {**TINY_MODEL["config"], **rates}})
    built = model_configuration(config, {"vocab_size": 300})
    changed = _without_dropout(built)
    assert [getattr(changed, name) for name in rates] == [0.0, 0.0, 0.0]
    assert [getattr(built, name) for name in rates] == [0.1, 0.2, 0.3]
    modules = build_model(config, changed, 0).modules()
    assert {one.p for one in modules if type(one).__name__ == "Dropout"} == {0.0}
