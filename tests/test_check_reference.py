"""`check`, without processes: what it compares with."""

from conftest import TINY_MODEL
from tiny_models import recipe_of

from clm_dist.config import ModelConfig
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration
from clm_dist.training.check import _compared, _without_dropout
from clm_dist.training.reference import Step


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


def test_in_bf16_the_loss_may_be_off_by_a_share_of_its_way():
    """After a step from 10.96 to 10.18 ZeRO's bf16 weights were at 10.202 on an H100; without a step that is an error."""
    config = recipe_of({"architecture": "gpt2", "mixed_precision": "bf16"}, 8)
    live, wanted = (Step(digest=1, lr=0.1, loss=loss, grad_norm=1.0) for loss in (10.202154, 10.180844))
    moved, still = (_compared(2, live, wanted, first, config) for first in (10.9628, 10.18))
    assert [one.kept for one in moved] == [True] * 4
    assert [one.promise for one in still if not one.kept] == ["loss"]
