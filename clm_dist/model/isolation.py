"""Whether a model keeps packed documents apart when their positions restart."""

import torch

from clm_dist.errors import UserError


def check_isolation(model: torch.nn.Module, block_size: int, name: str) -> None:
    """UserError where tokens of one document change the logits of the next in the same block.

    Two blocks (2, T) of two documents each, which end at different places, run twice with other first ones: the logits of
    the second ones must be the same to the bit or nearly. Two, since flash attention goes by positions in one row only.
    State-space models and those that number positions by themselves take `position_ids` without using them.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    here = torch.arange(block_size, device=device).expand(2, -1)
    ends = torch.tensor([[block_size // 2], [block_size - 1]], device=device)  # of the first documents
    second = here >= ends
    positions = torch.where(second, here - ends, here)
    ids = here * 7 % vocabulary
    other = torch.where(second, ids, (ids + 1) % vocabulary)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, two = (model(input_ids=each, position_ids=positions).logits[second] for each in (ids, other))
        leak, largest = (one - two).abs().max().item(), one.abs().max().item()
    except TypeError:  # knows no position_ids
        leak, largest = float("inf"), 0.0
    finally:
        model.train(was_training)
    if not leak <= 1e-5 * max(1.0, largest):
        raise UserError(
            f"train.isolate_documents=true, but {name} lets a document see the one before it in the same block (logits move "
            f"by {leak:.2g}); set it to false, or take a model that goes by position_ids, e.g. of type gpt2 or llama"
        )
