"""A causal language model by name or from scratch, checked against the data before any weight is loaded."""

import os
from pathlib import Path
from typing import Any

import torch

from clm_dist import hub
from clm_dist.config import ModelConfig
from clm_dist.errors import UserError
from clm_dist.model import lora, repairs, transformers_versions
from clm_dist.model.activation import fuse_gelu
from clm_dist.model.architectures import IDENTITY
from clm_dist.model.configuration import load_configuration, padded, row_of


def build_model(config: ModelConfig, built: Any, seed: int, vocab_size: int = 0) -> torch.nn.Module:
    """The model in fp32: pretrained weights of `config.name`, or random ones drawn from `seed`; with adapters if asked.

    vocab_size: of the tokenizer, where `model.pad_vocab_to_multiple_of` may have to make room for it.
    """
    if config.type is None and not config.from_scratch:
        model = load_model(str(config.name), built, config.revision, config.trust_remote_code, config.attention)
        if config.pad_vocab_to_multiple_of:
            _resize(model, vocab_size, config.pad_vocab_to_multiple_of, seed)
        if (row := row_of(built)) is not None and row.guide == IDENTITY:
            _generate_left_to_right(model)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the same weights on every rank and at every world size
            model = blank_model(config, built)
        model = model.float()
        _generate_left_to_right(model)
    fuse_gelu(model)
    freeze_unused(model)
    _learn_every_row(model)
    if config.lora is not None:
        lora.adapt(model, config.lora, seed)
    return model


def blank_model(config: ModelConfig, built: Any, dtype: torch.dtype | None = None) -> Any:
    """A model with the weights that its architecture begins with; on the meta device or under FakeTensorMode it takes no
    memory. UserError where the sizes do not go together."""
    repairs.apply(row_of(built))
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    try:
        maker = _maker(built)
        if maker is not None:
            return maker._from_config(built, **options)
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(built, trust_remote_code=config.trust_remote_code, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError, ImportError) as error:
        said = " ".join(str(error).split())
        if config.attention is not None:
            raise UserError(
                f"model.attention={config.attention} is not to be had for {built.model_type} here ({said}); leave it out or "
                "set model.attention=eager, which every architecture has"
            ) from None
        raise UserError(f"model.config={config.config} builds no {built.model_type}: {said}; correct it") from None


def outline(config: ModelConfig, built: Any, dtype: torch.dtype | None = None) -> Any:
    """What `build_model` makes, without what weights hold: for the meta device or FakeTensorMode."""
    model = blank_model(config, built, dtype)
    fuse_gelu(model)
    freeze_unused(model)
    if config.lora is not None:
        lora.adapt(model, config.lora, seed=None)
    return model


def freeze_unused(model: Any) -> None:
    """Weights that no text reaches (a decoder's attention to its encoder, an image encoder) are left as they are: they would
    have no gradient, for which DistributedDataParallel waits."""
    row = row_of(model.config)
    for part in row.unused if row else ():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)


def _learn_every_row(model: Any) -> None:
    """`nn.Embedding(padding_idx=...)` has no gradient for the row of the padding id. Where that is also the end of documents
    (`pad_token = eos_token`, as is often set), a model would never learn what it means to have read one."""
    for module in model.get_input_embeddings().modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def _generate_left_to_right(model: Any) -> None:
    """Takes away what `generate` does by default for a translator: several beams, a forced last token, no repetition."""
    from transformers import GenerationConfig

    if model.can_generate():
        kept = {key: getattr(model.config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)


def _maker(built: Any) -> Any:
    """The class of an architecture that the Auto classes do not build."""
    row = row_of(built)
    return transformers_versions.named(row.classes[1]) if row is not None and row.classes is not None else None


def _resize(model: Any, vocab_size: int, multiple: int, seed: int) -> None:
    """Makes the embedding, and the head with it, as long as the next multiple; new rows are drawn from `seed`."""
    size = padded(max(vocab_size, model.get_input_embeddings().weight.shape[0]), multiple)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.resize_token_embeddings(size)
        except (NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
            raise UserError(
                f"model.pad_vocab_to_multiple_of={multiple}: {type(model).__name__} cannot change its vocabulary "
                f"({' '.join(str(error).split())[:100]}); leave it out"
            ) from None


def load_model(
    name: str,
    built: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> torch.nn.Module:
    """A model with its weights from a folder or Hub id, in fp32. Safetensors only: a pickle could run code of others."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    # else transformers has a Space convert a pickle and loads what that proposes to the repository's owner
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    folder = Path(name)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{name} holds no weights (*.safetensors); to train it from random weights set model.from_scratch=true, "
            "else give a folder or Hub id with weights"
        )
    # that of the configuration, which was loaded before
    commit = None if built is None else hub.commit_of(name, revision, "config.json")
    known = built if built is not None else load_configuration(name, revision, trust_remote_code)
    repairs.apply(row_of(known))
    options = {} if attention is None else {"attn_implementation": attention}
    if attention is not None:  # before weights are fetched: what refuses it then looks like a broken model
        with torch.device("meta"):
            blank_model(ModelConfig(name=name, attention=attention, trust_remote_code=trust_remote_code), known)
    try:
        model, loaded = (_maker(known) or AutoModelForCausalLM).from_pretrained(
            name,
            config=known,
            **hub.resolve_model(name, commit or revision),
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: sizes that do not fit
        remedy = "or give a folder or Hub id with the weights of a causal language model (*.safetensors)"
        raise hub.refused(error, "model", name, revision, "model.name", remedy) from None
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers draws them at random: another model in every process and at every start
        raise UserError(
            f"{name} lacks {len(missing)} of the weights of {type(model).__name__} ({', '.join(missing[:3])}, ...); give a "
            "folder or Hub id that holds a whole causal language model, or set model.from_scratch=true"
        )
    return model
