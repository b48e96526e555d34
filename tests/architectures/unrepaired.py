"""What each repaired architecture does without its repair, as JSON: by the library's own code, in a process of its own."""

import copy
import json
import sys

import torch
import transformers

from clm_dist.config import ModelConfig
from clm_dist.errors import UserError
from clm_dist.model import repairs, transformers_versions
from clm_dist.model.architectures import GUIDE
from clm_dist.model.build import build_model
from clm_dist.model.causality import check_causality
from clm_dist.model.configuration import model_configuration
from clm_dist.model.loss import next_token_nll

IDS = torch.arange(3, 35)[None]


def behaviour(type_: str) -> str:
    """The first thing that goes wrong; fine: nothing."""
    config = ModelConfig(type=type_, preset="tiny")
    built = model_configuration(config, {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2})
    try:
        model = build_model(config, built, 0)
        model.config.use_cache = False
        check_causality(model, 48, type_, next_token_nll)
    except UserError:
        return "leaks"
    except Exception as error:
        return f"breaks: {type(error).__name__}"
    if not passes_alike(model):
        return "draws"
    if is_stale(model):
        return "stale"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(input_ids=IDS)
    except RuntimeError:
        return "breaks in bf16"
    return "fine"


def passes_alike(model) -> bool:
    """Whether two training passes from one seed are one."""
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(model.train()(input_ids=IDS).logits)
    return torch.equal(*found)


@torch.no_grad()
def is_stale(model) -> bool:
    """Whether it answers by the weights that it was evaluated with before."""
    model.eval()(input_ids=IDS)
    for parameter in model.parameters():
        parameter.add_(0.01)
    fresh = copy.deepcopy(model).train()
    fresh(input_ids=IDS)  # a training pass takes kept things away
    one, other = model(input_ids=IDS).logits, fresh.eval()(input_ids=IDS).logits
    return bool((one - other).abs().max() > 1e-5 * other.abs().max())


def main() -> None:
    transformers.logging.set_verbosity_error()
    if sys.argv[1] == "without":
        repairs._applied = lambda name: None
    rows = [row.type for row in GUIDE if row.repair and transformers_versions.MAJOR in row.lives]
    print(json.dumps({type_: behaviour(type_) for type_ in rows}))


if __name__ == "__main__":
    main()
