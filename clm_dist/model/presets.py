"""Sizes by name: `model.preset=tiny` or `small` of any architecture, by whatever names it has for its sizes."""

from typing import Any

from clm_dist.model.architectures import PRESETS, Architecture, Size

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# what architectures call the same thing; those that a configuration has are set
_NAMES = {
    "wide": (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"),
        *("input_embedding_size", "output_embedding_size"),
    ),
    "layers": (
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"),
        *("num_decoder_layers", "num_encoder_layers"),
    ),
    "heads": (
        *("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
    ),
    "inner": (
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dim_ff", "n_inner"),
        *("ffn_hidden_size", "feed_forward_size"),
    ),
    "head": ("head_dim", "d_head", "dim_head", "attention_head_size"),
    "experts": EXPERTS,
}
_KEY_VALUE_HEADS = "num_key_value_heads"


def preset_settings(preset: str, plain: Any, row: Architecture | None) -> dict[str, Any]:
    """Settings of a configuration that make it so large. plain: it as it comes."""
    size = PRESETS[preset]
    has = plain.to_dict()
    settings = {
        name: getattr(size, what) for what, names in _NAMES.items() for name in names if _is_size(has.get(name))
    }
    settings |= {name: size.inner for name in ("intermediate_size", "n_inner") if name in has and has[name] is None}
    if _KEY_VALUE_HEADS in has:  # two queries share a key where several do
        shared = _is_size(has[_KEY_VALUE_HEADS]) and has[_KEY_VALUE_HEADS] < plain.num_attention_heads
        settings[_KEY_VALUE_HEADS] = size.heads // 2 if shared else size.heads
    settings |= _of_experts(has, size)
    return settings | (row.sizes(size) if row else {})


def size_names(plain: Any) -> list[str]:
    """What a configuration calls its sizes."""
    has = plain.to_dict()
    return [name for names in _NAMES.values() for name in names if name in has]


def _of_experts(has: dict[str, Any], size: Size) -> dict[str, Any]:
    wanted = {
        "moe_intermediate_size": size.inner // 2,
        "shared_expert_intermediate_size": size.inner // 2,
        "num_experts_per_tok": 2,
    }
    return {name: value for name, value in wanted.items() if _is_size(has.get(name))}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
