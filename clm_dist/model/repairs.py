"""Code of transformers that leaks or breaks, mended. Each function names the lines that it stands in for.

Only how a model computes is mended, never what its weights mean. What is exported is the library's again: the model card
says where that computes otherwise.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from clm_dist.model.architectures import Architecture


def apply(row: Architecture | None) -> None:
    """Mends the library's classes of an architecture, once in a process."""
    if row is not None and row.repair is not None:
        _applied(row.repair)


@functools.cache
def _applied(name: str) -> None:
    {
        "cpmant": _cpmant,
        "prophetnet": lambda: _prophetnet(_module("prophetnet"), "ProphetNet"),
        "reformer": _reformer,
        "xmod": _xmod,
        "mega": _mega,
        "qdqbert": _qdqbert,
        "speech_to_text_2": _speech_to_text_2,
        "transfo_xl": _transfo_xl,
        "xlm_prophetnet": lambda: _prophetnet(_module("deprecated.xlm_prophetnet"), "XLMProphetNet"),
    }[name]()


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name.rpartition('.')[2]}")


def _cpmant() -> None:
    """`CpmAntModel.forward` calls every token context, which all may see (modeling_cpmant.py, `context = torch.full`), and
    takes id 0 for padding wherever it occurs."""

    def _prepare_attention_mask(self: Any, input_ids: Any, span: Any, context: Any, length: Any) -> torch.Tensor:
        """Text sees the prompt and what came before it; the prompt sees itself. (B, T, T) bool."""
        here = torch.arange(input_ids.shape[1], device=input_ids.device)
        prompt = here < self.prompt_length
        return ((here <= here[:, None]) | (prompt & prompt[:, None])).expand(input_ids.shape[0], -1, -1)

    _module("cpmant").CpmAntModel._prepare_attention_mask = _prepare_attention_mask


def _prophetnet(module: ModuleType, prefix: str) -> None:
    """`get_predict_relative_pos_embeddings` flattens values by (sequence, stream, head) and reads them by (stream, head,
    sequence): a token gets another one's bias, a later one's too (modeling_prophetnet.py, `permute(0, 2, 1, 4, 3)`)."""

    def get_predict_relative_pos_embeddings(
        self: Any, hidden_states: Any, attn_weights: Any, position_ids: Any, predict_relative_position_buckets: Any
    ) -> torch.Tensor:
        """(B, streams, heads, T, keys)."""
        batch, length = hidden_states.shape[:2]
        buckets = predict_relative_position_buckets
        if buckets is None:  # one token after others whose keys are kept
            keys = torch.arange(attn_weights.shape[-1], device=position_ids.device).repeat(batch, length, 1)
            ahead = keys - position_ids.unsqueeze(0).repeat(batch, length, 1)
            buckets = module.compute_relative_buckets(self.num_buckets, self.relative_max_distance, ahead, False)
        values = self.relative_pos_embeddings(hidden_states)
        values = values.view(*hidden_states.shape[:3], self.num_buckets, self.num_attn_heads).permute(0, 2, 4, 1, 3)
        return values.gather(-1, buckets.long()[:, None, None].expand(*values.shape[:3], -1, -1))

    attention = getattr(module, f"{prefix}NgramSelfAttention")
    attention.get_predict_relative_pos_embeddings = get_predict_relative_pos_embeddings


def _reformer() -> None:
    """`_init_attention_seed` and `_init_feed_forward_seed` draw from the operating system (modeling_reformer.py,
    `torch.seed()`): no two runs would be alike, and what is drawn afterwards neither. And a text that fills its last chunk
    in part is filled up with `pad_token_id`, which need not be there (`_pad_to_mult_of_chunk_length`); it is masked."""

    def drawn(name: str) -> Any:
        def seed(self: Any) -> None:
            value = int(torch.randint(2**62, ()))  # from the generator that the step has seeded
            setattr(self, name, value)
            torch.manual_seed(value)

        return seed

    model = _module("reformer").ReformerModel
    original = model._pad_to_mult_of_chunk_length

    def _pad_to_mult_of_chunk_length(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = self.config.pad_token_id
        self.config.pad_token_id = given or 0
        try:
            return original(self, *arguments, **keywords)
        finally:
            self.config.pad_token_id = given

    model._pad_to_mult_of_chunk_length = _pad_to_mult_of_chunk_length
    layer = _module("reformer").ReformerLayer
    layer._init_attention_seed = drawn("attention_seed")
    layer._init_feed_forward_seed = drawn("feed_forward_seed")


def _xmod() -> None:
    """`XmodOutput.lang_adapter` puts what autocast made into a tensor of another precision (modeling_xmod.py,
    `new_hidden_states[lang_mask] = ...`)."""
    output = _module("xmod").XmodOutput
    original = output.lang_adapter

    def lang_adapter(self: Any, lang_ids: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return original(self, lang_ids, hidden_states.float()).to(hidden_states.dtype)

    output.lang_adapter = lang_adapter


# Of transformers 4.57 only.


def _mega() -> None:
    """`MegaMultiDimensionDampedEma` keeps, from one evaluation to the next, what it computed of weights that may be others
    by then: a checkpoint was loaded in between (modeling_mega.py, `get_ema_coefficients`, `get_ema_kernel`)."""
    average = _module("deprecated.mega").MegaMultiDimensionDampedEma

    def get_ema_kernel(self: Any, length: int) -> torch.Tensor:
        kernel: torch.Tensor = self._compute_efficient_ema_kernel(min(self.truncation or length, length))
        return kernel

    average.get_ema_coefficients = average._compute_ema_coefficients
    average.get_ema_kernel = get_ema_kernel


def _qdqbert() -> None:
    """Its quantizers scale by the largest number of the whole batch (pytorch_quantization's TensorQuantizer without a
    calibrated amax), which later tokens have a say in: they are switched off, as before a calibration."""
    from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer

    model = _module("deprecated.qdqbert").QDQBertLMHeadModel
    original = model.__init__

    @functools.wraps(original)
    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        for module in self.modules():
            if isinstance(module, TensorQuantizer):
                module.disable()

    model.__init__ = init


def _speech_to_text_2() -> None:
    """The table of positions is never made: `Speech2Text2SinusoidalPositionalEmbedding.__init__` has lost its call of
    `make_weights`, and `_init_weights` asks for its `weight` (modeling_speech_to_text_2.py)."""
    module = _module("deprecated.speech_to_text_2")
    table, base = module.Speech2Text2SinusoidalPositionalEmbedding, module.Speech2Text2PreTrainedModel
    table_init, init_weights = table.__init__, base._init_weights

    @functools.wraps(table_init)
    def init(self: Any, num_positions: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        table_init(self, num_positions, embedding_dim, padding_idx)
        self.make_weights(num_positions + self.offset, embedding_dim, padding_idx)

    def make_weights(self: Any, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        made = self.get_embedding(num_embeddings, embedding_dim, padding_idx)
        if hasattr(self, "weights"):
            made = made.to(self.weights)
        self.register_buffer("weights", made, persistent=False)  # it is computed: no checkpoint needs it

    def _init_weights(self: Any, module: Any) -> None:
        if not isinstance(module, table):
            init_weights(self, module)

    table.__init__, table.make_weights, base._init_weights = init, make_weights, _init_weights


def _transfo_xl() -> None:
    """`TransfoXLModel.forward` calls `type_as(dtype=...)` of what `torch.arange` gave it, which torch has not
    (modeling_transfo_xl.py, `pos_seq = ...`): it is given one that has."""
    module = _module("deprecated.transfo_xl")

    class Torch(ModuleType):
        """torch, but for one name."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def arange(*arguments: Any, **keywords: Any) -> torch.Tensor:
            numbers = torch.arange(*arguments, **keywords)
            setattr(numbers, "type_as", lambda dtype: numbers.to(dtype=dtype))  # noqa: B010  # of this tensor alone
            return numbers

    setattr(module, "torch", Torch("torch"))  # noqa: B010
