"""A causal language model by name or from scratch, checked against the data before any weight is loaded."""

import os
from pathlib import Path
from typing import Any

import torch

from clm_dist import hub
from clm_dist.config import ModelConfig
from clm_dist.errors import ConfigError, UserError, nearest

# what architectures call their longest sequence
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
# these number positions from the padding id on, or look for padding in every batch: they cannot do without one
NEED_PADDING = {
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def model_configuration(config: ModelConfig, token_ids: dict[str, int | None]) -> Any:
    """The transformers configuration of the model: loaded or built, with `model.config.*` laid over it.

    token_ids: vocab_size, bos_token_id, eos_token_id and pad_token_id of the tokenizer, which a model built from
    `model.type` takes over unless `model.config` says otherwise.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.type is None:
        plain = load_configuration(str(config.name), config.revision, config.trust_remote_code)
        _refuse_unknown(plain, config.config)
        for key, value in config.config.items():
            setattr(plain, key, value)
        return plain
    if config.type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = nearest(config.type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UserError(f"model.type={config.type} is no causal language model that transformers knows{known}")
    architecture = CONFIG_MAPPING[config.type]
    _refuse_unknown(architecture(), config.config)
    # None too: the architecture's own defaults are of another vocabulary (OPT's padding, id 1, would never be trained)
    given = {key: value for key, value in token_ids.items() if value is not None or config.type not in NEED_PADDING}
    try:
        return architecture(**(given | config.config))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model.config={config.config} does not fit {config.type}: {error}; correct it") from None


def _refuse_unknown(built: Any, settings: dict[str, Any]) -> None:
    """transformers takes any key in silence; a misspelt one would train another model than was asked for."""
    known = {key for key in dir(built) if not key.startswith("_") and not callable(getattr(type(built), key, None))}
    known |= set(built.attribute_map)
    problems = [f"unknown key model.config.{key}{nearest(key, known)}" for key in settings if key not in known]
    if problems:
        raise ConfigError(problems)


def load_configuration(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a folder or Hub id; UserError where there is none."""
    from transformers import AutoConfig

    try:
        where = hub.resolve_model(name, revision)
        return AutoConfig.from_pretrained(name, **where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        remedy = "or give a folder with config.json as model.name"
        raise hub.refused(error, "model", name, revision, "model.name", remedy) from None


def check_fits(built: Any, block_size: int, vocab_size: int, name: str) -> None:
    """Refuses a model that cannot read the blocks: too few positions, or ids beyond its embedding."""
    problems = []
    positions = max_positions(built)
    if positions is not None and block_size > positions:
        problems.append(
            f"data.block_size={block_size} exceeds the {positions} positions of {name}; set data.block_size={positions} "
            "(or less) and prepare again"
        )
    embedding = getattr(built.get_text_config(), "vocab_size", None)
    if embedding is not None and vocab_size > embedding:
        problems.append(
            f"the tokenizer has {vocab_size} tokens, the embedding of {name} only {embedding}; set data.tokenizer to the "
            f"model's own, or for a model from scratch leave model.config.vocab_size out"
        )
    if problems:
        raise ConfigError(problems)


def max_positions(built: Any) -> int | None:
    """The longest sequence a model can number, None where its configuration names no limit."""
    for field in POSITION_FIELDS:
        value = getattr(built.get_text_config(), field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def build_model(config: ModelConfig, built: Any, seed: int) -> torch.nn.Module:
    """The model in fp32: pretrained weights of `config.name`, or random ones drawn from `seed`."""
    if config.type is None and not config.from_scratch:
        return load_model(str(config.name), built, config.revision, config.trust_remote_code)
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same weights on every rank and at every world size
        try:
            model = AutoModelForCausalLM.from_config(built, trust_remote_code=config.trust_remote_code)
        except (TypeError, ValueError) as error:  # sizes that do not go together
            raise UserError(f"model.config={config.config} builds no {built.model_type}: {error}; correct it") from None
    return model.float()


def load_model(
    name: str, built: Any = None, revision: str | None = None, trust_remote_code: bool = False
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
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name,
            config=built,
            **hub.resolve_model(name, commit or revision),
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
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


def checkpoint_activations(model: Any) -> None:
    """Keeps only the inputs of the blocks for backward (Chen et al., arXiv:1604.06174); UserError where it cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} cannot compute activations again; set train.activation_checkpointing=false"
        )
    # the re-entrant kind loses DDP's hooks where a block is used twice
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
