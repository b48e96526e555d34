"""What differs between the two versions of transformers that are supported, 4.57 and 5, in one place."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

from clm_dist.model.architectures import FOUR, Architecture

MAJOR = int(version("transformers").partition(".")[0])


def elsewhere(given: str, row: Architecture) -> str:
    """What to do about an architecture that lives in the other version only."""
    if row.lives == FOUR:
        extra = f", and pip install --no-deps {row.extra}" if row.extra else ""
        return (
            f"{given} has left transformers 5 (here: {version('transformers')}); {row.name} lives in 4.57: make another "
            f"environment with pip install 'clm-dist[legacy]' 'transformers==4.57.6'{extra} (in a clone: make "
            ".venv-legacy/.installed) and give this command to its clm-dist (.venv-legacy/bin/clm-dist), see "
            "docs/architectures.md"
        )
    return f"{given} needs transformers 5 (here: {version('transformers')}); pip install 'transformers>=5'"


def named(name: str) -> Any:
    """A class of transformers by its name."""
    import transformers

    return getattr(transformers, name)


def rope_field() -> str:
    """The setting by which rotary positions are scaled."""
    return "rope_parameters" if MAJOR >= 5 else "rope_scaling"


@contextmanager
def without_looking_at_batches(one_document_a_row: bool) -> Iterator[None]:
    """Within, ids are not looked at for padding, to warn of it, nor by 5 positions, whether several documents share a row,
    where none do: each is a look of the CPU at a GPU in every forward pass, which waits for all that was launched before."""
    from transformers import PreTrainedModel

    with ExitStack() as stack:
        stack.enter_context(patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None))
        if one_document_a_row and MAJOR >= 5:
            for target, name, instead in _lookers():
                stack.enter_context(patch.object(target, name, instead))
        yield


@contextmanager
def without_looking_at_values() -> Iterator[None]:
    """For tensors without contents: nothing of transformers asks what ids, masks and positions hold.

    5 looks at positions whether several documents share a row, and makes a T x T mask where it cannot see it; in training
    it sees that none do, and leaves the mask to the attention kernel. 4.57 makes the mask always; it looks for padding
    among the ids, to warn of it, and whether a mask masks anything: one that is all ones counts as none.
    """
    with ExitStack() as stack:
        for target, name, instead in _lookers():
            stack.enter_context(patch.object(target, name, instead))
        yield


def _lookers() -> Iterator[tuple[Any, str, Any]]:
    """What looks at values, and what stands for it."""
    if MAJOR >= 5:
        from transformers import masking_utils

        if hasattr(masking_utils, "find_packed_sequence_indices"):
            yield masking_utils, "find_packed_sequence_indices", lambda position_ids: None
        return
    from transformers import PreTrainedModel
    from transformers.modeling_attn_mask_utils import AttentionMaskConverter

    may_leave_out = AttentionMaskConverter._ignore_causal_mask_sdpa
    yield PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None
    yield (
        AttentionMaskConverter,
        "_ignore_causal_mask_sdpa",
        lambda attention_mask, *sizes, **options: may_leave_out(None, *sizes, **options),
    )
