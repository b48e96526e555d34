"""Whether adapters work for an architecture: put in place, trained a step, merged."""

import torch

from clm_dist.config import LoraConfig, ModelConfig
from clm_dist.errors import UserError
from clm_dist.model import lora
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration
from clm_dist.model.loss import next_token_nll

IDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def verdict(row, settings=None):
    """`yes`, or `no: ` and why. row: of clm_dist.model.architectures, which this version of transformers has."""
    config = ModelConfig(type=row.type, preset="tiny", lora=settings or LoraConfig(rank=4))
    try:
        model = build(config, 1)
        lora.check_reached(model, 32)
    except (UserError, ValueError) as error:
        return f"no: {' '.join(str(error).split())}"
    ids = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    draw_b(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if odd := [name for name in trained if not name.endswith((lora.A, lora.B))]:
        return f"no: {odd[0]} is trained, and no adapter"
    next_token_nll(model.train()(input_ids=ids).logits, ids).mean().backward()
    if still := [name for name, one in trained.items() if one.grad is None or not one.grad.any()]:
        return f"no: {still[0]} has no gradient"
    plain = build(config.model_copy(update={"lora": None}), 2)
    plain.load_state_dict(lora.merged(model, dict(model.state_dict())))
    off = apart(model, plain, ids)
    return "yes" if off <= 1e-4 else f"no: merged, its logits are {off:.1e} of the largest apart"


def build(config, seed):
    """A model as training begins with it."""
    model = build_model(config, model_configuration(config, IDS), seed)
    model.config.use_cache = False
    return model


@torch.no_grad()
def draw_b(model):
    """B as it may be once trained: zeros would hide what is wrong with A, and with merging."""
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(lora.B):
            parameter.normal_(std=0.1, generator=drawn)


@torch.no_grad()
def apart(model, plain, ids):
    """Largest difference of logits over the largest logit."""
    one, other = (each.eval()(input_ids=ids).logits for each in (model, plain))
    return ((one - other).abs().max() / one.abs().max()).item()
