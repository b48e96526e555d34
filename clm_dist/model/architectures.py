"""What is odd about each architecture of the causal-LM guide, and about some that came after it: data, no branches.

The guide (https://huggingface.co/docs/transformers/v4.35.0/tasks/language_modeling) says "choose one" of 59. Only 21 of them
learn the next token as it uses them. A row says what the others need; causality.py proves it at every start, for models
without a row too, and docs/architectures.md shows what came out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BOTH, FIVE, FOUR, NEITHER = (4, 5), (5,), (4,), ()  # major versions of transformers

# What the guide's `labels=input_ids` teaches a model that is built as it comes.
NEXT_TOKEN = "the next token"
FUTURE = "the next token, which it sees: attention goes both ways"
IDENTITY = "the token that it is given: labels are not shifted"
BOTH_WRONG = "the token that it is given, and attention goes both ways"
NOTHING = "nothing: it breaks"


@dataclass(frozen=True)
class Size:
    """How large a preset is."""

    wide: int  # of the vectors between layers
    layers: int
    heads: int
    inner: int  # of the feed-forward networks
    experts: int = 4

    @property
    def head(self) -> int:
        """Of one attention head."""
        return self.wide // self.heads


PRESETS = {"tiny": Size(wide=32, layers=2, heads=4, inner=64), "small": Size(wide=512, layers=6, heads=8, inner=2048)}


@dataclass(frozen=True)
class Architecture:
    """One row. A name (of a model_type, of a setting) is transformers' own."""

    name: str  # as the guide writes it
    type: str  # model.type
    guide: str = NEXT_TOKEN
    needs: Mapping[str, Any] = field(default_factory=dict)  # to be a left-to-right model of text
    scratch: Mapping[str, Any] = field(default_factory=dict)  # the same, where no weights are loaded
    sizes: Callable[[Size], dict[str, Any]] = lambda size: {}  # of a preset, beside the usual ones
    past_vocabulary: tuple[str, ...] = ()  # ids that have to stand behind the text's
    needs_padding: bool = False  # it numbers positions from the padding id on, or looks for it in every batch
    positions: str = "learned"  # learned, sinusoidal, grown, rotary, alibi, relative, recurrent, axial
    reserved: bool = False  # no token gets a position up to the padding id
    # linear layers without LoRA: kernels read their weights past the layer, they are a head, or peft takes them for experts
    no_adapter: tuple[str, ...] = ()
    reversible: bool = False  # its backward pass is its own, and begins only where the embeddings have a gradient
    unused: tuple[str, ...] = ()  # parts of names of weights that no text reaches: they are frozen
    classes: tuple[str, str] | None = None  # of configuration and model, where the Auto classes have none
    tied: tuple[int, ...] = BOTH  # the head is the embedding, unless tie_word_embeddings says otherwise
    sdpa: tuple[int, ...] = BOTH  # attention by torch's fused kernels
    checkpointing: tuple[int, ...] = BOTH  # activations can be computed again
    generates: bool = True  # by transformers' own `generate`; else by whole passes
    lives: tuple[int, ...] = BOTH
    repair: str | None = None  # what of the library's code is mended, in repairs.py
    noise: float = 0.0  # of the largest logit, that later tokens leave in earlier ones by rounding
    extra: str | None = None  # a package beside transformers


_DECODER = {"is_decoder": True, "add_cross_attention": False}
_CROSS = ("encoder_attn",)  # attention to an encoder that is not there


def _encoder(name: str, type_: str, **odd: Any) -> Architecture:
    """BERT and its kin: encoders that are decoders if told so."""
    return Architecture(name, type_, **{"guide": FUTURE, "needs": _DECODER, **odd})


def _roberta(name: str, type_: str, **odd: Any) -> Architecture:
    """Positions from the padding id on; `generate` counts them from 0, and so samples from another model."""
    return _encoder(name, type_, **{"needs_padding": True, "reserved": True, "generates": False, **odd})


def _decoder(name: str, type_: str, **odd: Any) -> Architecture:
    """The right half of a translator."""
    return Architecture(name, type_, **{"guide": IDENTITY, "unused": _CROSS, **odd})


def _rotary(name: str, type_: str, **odd: Any) -> Architecture:
    return Architecture(name, type_, **{"positions": "rotary", **odd})


def _modern(name: str, type_: str, **odd: Any) -> Architecture:
    return _rotary(name, type_, **{"tied": NEITHER, **odd})


GUIDE = (
    _decoder("BART", "bart"),
    _encoder("BERT", "bert"),
    _encoder("Bert Generation", "bert-generation", sdpa=FIVE),
    # block_sparse sees the future even as a decoder, beyond (5 + 2 * num_random_blocks) * block_size tokens: 704
    _encoder("BigBird", "big_bird", needs={**_DECODER, "attention_type": "original_full"}, unused=("pooler",), sdpa=NEITHER),
    _decoder("BigBird-Pegasus", "bigbird_pegasus", sdpa=NEITHER, tied=FOUR),
    Architecture("BioGpt", "biogpt"),
    _decoder("Blenderbot", "blenderbot"),
    _decoder("BlenderbotSmall", "blenderbot-small"),
    Architecture("BLOOM", "bloom", positions="alibi", sdpa=NEITHER),
    _roberta("CamemBERT", "camembert"),
    _rotary("CodeLlama", "code_llama", tied=NEITHER),
    Architecture(
        "CodeGen", "codegen", positions="sinusoidal", sizes=lambda s: {"rotary_dim": s.head}, tied=NEITHER, sdpa=NEITHER
    ),
    Architecture(
        "CPM-Ant", "cpmant", guide=BOTH_WRONG, sizes=lambda s: {"prompt_length": 4, "prompt_types": 4}, positions="relative",
        unused=(), sdpa=NEITHER, checkpointing=NEITHER, generates=False, repair="cpmant", tied=FOUR,
    ),
    Architecture("CTRL", "ctrl", sizes=lambda s: {"dff": s.inner}, positions="sinusoidal", sdpa=FIVE, checkpointing=NEITHER),
    _roberta("Data2VecText", "data2vec-text", sdpa=FIVE),
    _encoder("ELECTRA", "electra", sdpa=FIVE),
    _encoder("ERNIE", "ernie", sdpa=FIVE),
    _rotary("Falcon", "falcon", sizes=lambda s: {"num_kv_heads": s.heads}),
    Architecture(
        "GIT", "git", guide=NOTHING, unused=("image_encoder", "visual_projection"), sdpa=NEITHER, tied=NEITHER,
        sizes=lambda s: {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                                           "num_attention_heads": 2, "image_size": 32, "projection_dim": 32}},
        generates=False,
    ),
    Architecture("GPT-Sw3", "gpt-sw3"),
    Architecture("GPT-2", "gpt2"),
    Architecture("GPTBigCode", "gpt_bigcode", checkpointing=FIVE),  # 4.57 sets the flag and never asks for it
    Architecture(
        "GPT Neo", "gpt_neo", sizes=lambda s: {"attention_types": [[["global", "local"], s.layers // 2]]}, sdpa=NEITHER
    ),
    _rotary("GPT NeoX", "gpt_neox", tied=NEITHER),
    _rotary("GPT NeoX Japanese", "gpt_neox_japanese", sdpa=NEITHER, checkpointing=NEITHER),
    Architecture(
        "GPT-J", "gptj", positions="sinusoidal", sizes=lambda s: {"rotary_dim": s.head}, tied=NEITHER, sdpa=NEITHER
    ),
    _rotary("LLaMA", "llama", tied=NEITHER),
    _decoder("Marian", "marian", positions="sinusoidal"),
    _decoder("mBART", "mbart"),
    # either of the two settings alone still leaks; its Fourier transform mixes all places, in fp32 whatever it is given
    Architecture(
        "MEGA", "mega", guide=FUTURE, needs={**_DECODER, "bidirectional": False}, positions="rotary", lives=FOUR,
        sizes=lambda s: {"ema_projection_size": 4, "shared_representation_size": s.wide // 2, "nffn_hidden_size": s.inner},
        sdpa=NEITHER, checkpointing=NEITHER, generates=False, noise=1e-6, repair="mega",
    ),
    _encoder("Megatron-BERT", "megatron-bert", sdpa=NEITHER),
    Architecture("MPT", "mpt", positions="sinusoidal", sdpa=NEITHER),  # ALiBi, made once for max_seq_len
    _decoder(
        "MusicGen", "musicgen", guide=NOTHING, classes=("MusicgenDecoderConfig", "MusicgenForCausalLM"),
        needs={"num_codebooks": 1, "audio_channels": 1}, past_vocabulary=("pad_token_id", "bos_token_id"),
        positions="grown", tied=NEITHER, generates=False, no_adapter=("lm_heads",),
    ),
    _decoder("MVP", "mvp", sdpa=NEITHER),
    _rotary("OpenLlama", "open-llama", lives=FOUR, sdpa=NEITHER, generates=False, tied=NEITHER),
    Architecture("OpenAI GPT", "openai-gpt", sdpa=NEITHER, checkpointing=NEITHER),
    Architecture("OPT", "opt"),
    _decoder("Pegasus", "pegasus", positions="sinusoidal"),
    _rotary("Persimmon", "persimmon", tied=NEITHER),
    _decoder("PLBart", "plbart"),
    Architecture(
        "ProphetNet", "prophetnet", guide=BOTH_WRONG, needs={"ngram": 1, "add_cross_attention": False},
        needs_padding=True, reserved=True, sdpa=NEITHER, repair="prophetnet",
    ),
    Architecture(
        "QDQBert", "qdqbert", guide=FUTURE, needs=_DECODER, lives=FOUR, sdpa=NEITHER, generates=False,
        repair="qdqbert", extra="pytorch-quantization",
    ),
    # hashed attention looks at future tokens to choose among past ones; hashes over whole sequences do not (causality.py)
    Architecture(
        "Reformer", "reformer", guide=NOTHING, needs={"is_decoder": True}, positions="axial",
        scratch={"axial_pos_embds": False, "attn_layers": ["local"] * 6},
        sizes=lambda s: {"attn_layers": ["local"] * s.layers},
        unused=("lm_head.bias",), tied=NEITHER, sdpa=NEITHER, checkpointing=NEITHER, generates=False, repair="reformer",
        reversible=True,
    ),
    _encoder("RemBERT", "rembert", tied=NEITHER, sdpa=NEITHER),
    _roberta("RoBERTa", "roberta"),
    _roberta("RoBERTa-PreLayerNorm", "roberta-prelayernorm", sdpa=FIVE),
    _encoder(
        "RoCBert", "roc_bert", sdpa=FIVE,
        sizes=lambda s: {"pronunciation_embed_dim": s.wide, "shape_embed_dim": s.wide, "shape_vocab_size": 8},
    ),
    _encoder("RoFormer", "roformer", positions="sinusoidal", sdpa=NEITHER),
    Architecture(
        "RWKV", "rwkv", positions="recurrent", sizes=lambda s: {"attention_hidden_size": s.wide}, tied=NEITHER, sdpa=NEITHER
    ),
    _decoder(
        "Speech2Text2", "speech_to_text_2", guide=NOTHING, positions="grown", lives=FOUR, sdpa=NEITHER,
        generates=False, needs_padding=True, repair="speech_to_text_2",
    ),
    # same_length, its default, with no memory masks every row: attention is then uniform, over the future too
    Architecture(
        "Transformer-XL", "transfo-xl", guide=NOTHING,
        needs={"mem_len": 0, "same_length": False, "trainer_compatible": True},
        scratch={"cutoffs": [], "div_val": 1, "proj_share_all_but_first": False},
        sizes=lambda s: {"d_embed": s.wide}, positions="relative", lives=FOUR,
        sdpa=NEITHER, checkpointing=NEITHER, generates=False, repair="transfo_xl",
    ),
    _decoder("TrOCR", "trocr", sdpa=NEITHER),
    Architecture("XGLM", "xglm", positions="grown", sdpa=NEITHER),
    Architecture(
        "XLM", "xlm", guide=BOTH_WRONG, needs={"causal": True}, needs_padding=True, sdpa=NEITHER,
        checkpointing=NEITHER, generates=False,
    ),
    Architecture(
        "XLM-ProphetNet", "xlm-prophetnet", guide=BOTH_WRONG, needs={"ngram": 1, "add_cross_attention": False},
        needs_padding=True, reserved=True, lives=FOUR, sdpa=NEITHER, generates=False, repair="xlm_prophetnet",
    ),
    _roberta("XLM-RoBERTa", "xlm-roberta"),
    _roberta("XLM-RoBERTa-XL", "xlm-roberta-xl", checkpointing=FIVE),
    Architecture(
        "XLNet", "xlnet", guide=BOTH_WRONG, needs={"attn_type": "uni", "mem_len": 0}, positions="relative",
        unused=("mask_emb", "seg_embed", "r_s_bias"), sdpa=NEITHER, checkpointing=NEITHER, generates=False,
    ),
    _roberta("X-MOD", "xmod", guide=NOTHING, scratch={"default_language": "en_XX"}, sdpa=FIVE, repair="xmod"),
)  # fmt: skip

# Of those that came after the guide: different heads, attentions, experts and recurrences, each proved like the others.
LATER = (
    _modern("Qwen2", "qwen2"),
    _modern("Qwen3", "qwen3"),
    _modern("Qwen3 MoE", "qwen3_moe"),
    _modern("Gemma 2", "gemma2", tied=BOTH, sdpa=FOUR),
    _modern("Gemma 3", "gemma3_text", tied=BOTH),
    _modern("Mistral", "mistral"),
    _modern("Mixtral", "mixtral"),
    _modern("Phi", "phi"),
    _modern("Phi-3", "phi3"),
    _modern("OLMo 2", "olmo2"),
    _modern("SmolLM3", "smollm3", tied=BOTH),
    _modern("Granite", "granite"),
    _modern("StarCoder 2", "starcoder2", tied=BOTH),
    _modern("StableLM", "stablelm"),
    _modern("Cohere 2", "cohere2", tied=BOTH),
    _modern("GLM-4", "glm4"),
    _modern(
        "DeepSeek-V3",
        "deepseek_v3",
        sizes=lambda s: {
            "qk_nope_head_dim": s.head,
            "qk_rope_head_dim": s.head,
            "v_head_dim": s.head,
            "n_group": 2,
            "kv_lora_rank": s.wide // 2,
            "q_lora_rank": s.wide // 2,
            "topk_group": 1,
            "num_key_value_heads": s.heads,
            "first_k_dense_replace": 1,
        },
        no_adapter=(".mlp.",),
    ),
    _modern("gpt-oss", "gpt_oss", sdpa=NEITHER),
    _modern("LFM2", "lfm2", tied=BOTH),
    Architecture("Mamba", "mamba", positions="recurrent", sdpa=NEITHER, no_adapter=("x_proj", "dt_proj", "out_proj")),
    Architecture(
        "Mamba 2",
        "mamba2",
        positions="recurrent",
        sdpa=NEITHER,
        tied=NEITHER,
        sizes=lambda s: {"num_heads": 2 * s.heads, "n_groups": 1, "state_size": 16, "chunk_size": 64},
        no_adapter=("out_proj",),
    ),
    _modern(
        "Jamba",
        "jamba",
        positions="recurrent",
        scratch={"use_mamba_kernels": False},
        sizes=lambda s: {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
        no_adapter=("dt_proj",),
    ),
)

BY_TYPE = {row.type: row for row in (*GUIDE, *LATER)}
