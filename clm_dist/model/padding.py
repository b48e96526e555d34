"""Whether a text holds the id that its model takes for padding wherever it stands.

RoBERTa and its kin number positions from the padding id on and give it none itself; XLM counts what is no padding and
takes as many places off the end as are. Blocks have padding at their ends alone: no id of the text may be taken for it.
"""

from typing import Any

import numpy as np

from clm_dist.errors import UserError
from clm_dist.model.configuration import row_of
from clm_dist.model.positions import max_positions


def looks_for_padding(built: Any) -> bool:
    """Whether the model takes an id for padding by itself, without a mask."""
    row = row_of(built)
    return row is not None and row.needs_padding


def padding_id(built: Any) -> int | None:
    """The id that the model looks for."""
    return getattr(built, "pad_index", built.pad_token_id)  # XLM's own name; of transformers 5 the same setting


def check_prompt(built: Any, ids: list[int], tokenizer: Any) -> None:
    """UserError where a prompt holds the id that the model takes for padding."""
    if looks_for_padding(built) and (found := padding_id(built)) in ids:
        raise UserError(
            f"the prompt holds {_called(int(found or 0), tokenizer)} (id {found}), which {built.model_type} takes for "
            "padding wherever it stands; leave it out of the prompt"
        )


def no_padding(built: Any, present: np.ndarray, tokenizer: Any, block_size: int, name: str, trained: bool) -> UserError:
    """What to say where the text holds the id that the model takes for padding, or where it has none.

    present: (V,) bool, which ids the text holds. trained: whether the model has weights, whose positions begin at that id.
    """
    found = padding_id(built)
    if found is None:
        given = f"{name} has no padding id, and cannot number positions without one"
    else:
        end = ", which ends documents," if found == tokenizer.eos_token_id else ""
        given = (
            f"{name} takes id {found} for padding wherever it stands (no position, nothing learned of it), but "
            f"{_called(found, tokenizer)}{end} is in the text"
        )
    return UserError(f"{given}; {_remedy(built, present, tokenizer, block_size, trained)}")


def _called(token: int, tokenizer: Any) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token)) if token < len(tokenizer) else "it"


def _remedy(built: Any, present: np.ndarray, tokenizer: Any, block_size: int, trained: bool) -> str:
    if trained:
        return (
            "set data.tokenizer to the model's own and prepare again, or leave out the documents that spell its padding "
            "token (its weights know no other padding id)"
        )
    own = tokenizer.pad_token_id
    free = [own] if own is not None and own < len(present) and not present[own] else np.flatnonzero(~present)
    settings = {}
    if len(free):
        wanted = int(free[0])
    else:
        wanted, settings["vocab_size"] = len(present), len(present) + 1
    key = "pad_index" if "pad_index" in vars(built) else "pad_token_id"
    settings[key] = wanted
    row, positions = row_of(built), max_positions(built)
    if row is not None and row.reserved and positions is not None:
        needed = wanted + 1 + block_size
        if needed > built.max_position_embeddings:
            settings["max_position_embeddings"] = needed
    said = " ".join(f"model.config.{key}={value}" for key, value in settings.items())
    return f"set {said}, which no text has, or give the tokenizer a pad_token of its own and prepare again"
