"""Whether a model keeps packed documents apart when their positions restart."""

import torch

from clm_dist.errors import UserError


def check_isolation(model: torch.nn.Module, block_size: int, name: str) -> None:
    """UserError where tokens of one document change the logits of the next in the same block (1, T).

    Two documents of half a block, run twice with another first one: the logits of the second must be the same to the bit
    or nearly. State-space models and those that number positions by themselves take `position_ids` without using them.
    """
    half = block_size // 2
    device = next(model.parameters()).device
    positions = torch.cat([torch.arange(half), torch.arange(block_size - half)]).unsqueeze(0).to(device)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    ids = (torch.arange(block_size, device=device) * 7 % vocabulary).unsqueeze(0)
    other = ids.clone()
    other[:, :half] = (other[:, :half] + 1) % vocabulary
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            first, second = (model(input_ids=one, position_ids=positions).logits[0, half:] for one in (ids, other))
        leak = (first - second).abs().max().item()
    except TypeError:  # knows no position_ids
        leak = float("inf")
    finally:
        model.train(was_training)
    if not leak <= 1e-5 * max(1.0, first.abs().max().item() if leak < float("inf") else 1.0):
        raise UserError(
            f"train.isolate_documents=true, but {name} lets a document see the one before it in the same block (logits move "
            f"by {leak:.2g}); set it to false, or take a model that goes by position_ids, e.g. of type gpt2 or llama"
        )
