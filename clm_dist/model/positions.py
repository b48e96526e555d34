"""How long a sequence a model can read, by the kind of its positions, and block sizes that it cannot."""

import math
from typing import Any

from clm_dist.errors import ConfigError
from clm_dist.model import transformers_versions
from clm_dist.model.configuration import row_of

# what architectures call their longest sequence
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
_ENDLESS = ("grown", "alibi", "relative", "recurrent")  # any length can be computed
_SCALED = ("linear", "dynamic", "yarn")  # kinds of rotary scaling whose factor stretches the original length


def max_positions(built: Any) -> int | None:
    """The longest sequence a model can number, None where there is no limit."""
    row, text = row_of(built), built.get_text_config()
    kind = row.positions if row else "rotary"
    if kind in _ENDLESS or getattr(text, "alibi", False) is True:
        return None
    if kind == "axial" and text.axial_pos_embds:
        return math.prod(text.axial_pos_shape)
    found = next((value for field in POSITION_FIELDS if _is_count(value := getattr(text, field, None))), None)
    if found is not None and row is not None and row.reserved:
        return found - (text.pad_token_id or 0) - 1
    return _stretched(text, found) if found is not None and kind == "rotary" else found


def check_fits(built: Any, block_size: int, vocab_size: int, name: str, resized: bool = False) -> None:
    """Refuses a model that cannot read the blocks: too few positions, a length that it cannot divide, or ids beyond its
    embedding. resized: whether the embedding is made to fit."""
    problems = list(_about_length(built, block_size, name))
    embedding = getattr(built.get_text_config(), "vocab_size", None)
    if embedding is not None and vocab_size > embedding and not resized:
        problems.append(
            f"the tokenizer has {vocab_size} tokens, the embedding of {name} only {embedding}; set data.tokenizer to the "
            "model's own, or model.pad_vocab_to_multiple_of=64 to make room, or for a model from scratch leave "
            "model.config.vocab_size out"
        )
    if problems:
        raise ConfigError(problems)


def _about_length(built: Any, block_size: int, name: str) -> list[str]:
    """What is wrong with a block size."""
    row = row_of(built)
    if row is not None and row.type == "reformer":
        return _about_chunks(built, block_size, name)
    if row is not None and row.type == "mega" and built.use_chunking and block_size % built.chunk_size:
        return [
            f"data.block_size={block_size} is no multiple of {name}'s chunk_size={built.chunk_size}; change one of them, or "
            "set model.config.use_chunking=false"
        ]
    positions = max_positions(built)
    if positions is None or block_size <= positions:
        return []
    remedy = f"set data.block_size={positions} (or less) and prepare again"
    if row is None or row.positions == "rotary":
        scaling = f"model.config.{transformers_versions.rope_field()}"
        remedy += (
            f"; or, as its positions are rotary, model.config.max_position_embeddings={block_size} from scratch, {scaling}="
            f"{{rope_type: linear, factor: {-(-block_size // positions)}.0, rope_theta: 10000.0}} for trained weights"
        )
    return [f"data.block_size={block_size} exceeds the {positions} positions of {name}; {remedy}"]


def _about_chunks(built: Any, block_size: int, name: str) -> list[str]:
    """Reformer (Kitaev et al., arXiv:2001.04451) trains at one length, and hashes look at all of it."""
    problems = []
    chunks = {
        kind: getattr(built, f"{kind}_attn_chunk_length") for kind in ("local", "lsh") if kind in built.attn_layers
    }
    if built.axial_pos_embds and block_size != (only := math.prod(built.axial_pos_shape)):
        problems.append(
            f"data.block_size={block_size}, but {name} trains at {only} tokens alone, the product of its axial_pos_shape; "
            f"set data.block_size={only} and prepare again, or from scratch model.config.axial_pos_embds=false"
        )
    elif not built.axial_pos_embds and block_size > built.max_position_embeddings:
        problems.append(
            f"data.block_size={block_size} exceeds the {built.max_position_embeddings} positions of {name}; set "
            f"data.block_size={built.max_position_embeddings} (or less) and prepare again"
        )
    multiple = math.lcm(*chunks.values())
    if block_size > min(chunks.values()) and block_size % multiple:
        less = max(multiple, block_size // multiple * multiple)
        problems.append(
            f"data.block_size={block_size} is no multiple of {multiple}, the chunk length of {name}'s attention; set "
            f"data.block_size={less} and prepare again, or another model.config.local_attn_chunk_length"
        )
    if "lsh" in chunks and chunks["lsh"] < block_size:
        problems.append(
            f"{name} has hashed attention in chunks of {chunks['lsh']}, which by later tokens chooses what a token sees of "
            f"earlier ones: no left-to-right model at data.block_size={block_size}; set model.config.attn_layers="
            f"{['local'] * len(built.attn_layers)}".replace("'", "")
            + f" or model.config.lsh_attn_chunk_length={block_size}"
        )
    return problems


def _stretched(text: Any, found: int) -> int:
    """The length that rotary positions were scaled to."""
    scaling = getattr(text, transformers_versions.rope_field(), None) or {}
    factor, kind = scaling.get("factor"), scaling.get("rope_type", scaling.get("type"))
    if not isinstance(factor, int | float) or kind not in _SCALED:
        return found
    original = scaling.get("original_max_position_embeddings") or found
    return max(found, int(original * factor))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
