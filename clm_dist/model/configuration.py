"""The configuration of a model, loaded or from scratch: what its architecture needs laid under what the recipe says."""

from typing import Any

from clm_dist import hub
from clm_dist.config import ModelConfig
from clm_dist.errors import ConfigError, UserError, nearest
from clm_dist.model import transformers_versions
from clm_dist.model.architectures import BY_TYPE, Architecture
from clm_dist.model.presets import EXPERTS, preset_settings, size_names

# what the library calls some of the guide's names
_BUILT_AS = {"code_llama": "llama"}
_CALLED = {"musicgen_decoder": "musicgen"}  # by the configurations that they come with


def model_configuration(config: ModelConfig, token_ids: dict[str, int | None]) -> Any:
    """The transformers configuration of the model: loaded or built, with `model.config.*` laid over it.

    token_ids: vocab_size, bos_token_id, eos_token_id and pad_token_id of the tokenizer, which a model built from
    `model.type` takes over unless `model.config` says otherwise.
    """
    if config.type is None:
        plain = load_configuration(str(config.name), config.revision, config.trust_remote_code)
        _refuse_unknown(plain, config.config)
        for key, value in config.config.items():
            setattr(plain, key, value)
        if config.from_scratch and config.pad_vocab_to_multiple_of:
            wanted = max(int(token_ids.get("vocab_size") or 0), plain.vocab_size)
            plain.vocab_size = padded(wanted, config.pad_vocab_to_multiple_of)
        return plain
    from huggingface_hub.errors import StrictDataclassError

    row = BY_TYPE.get(config.type)
    _refuse_elsewhere(row, f"model.type={config.type}")
    architecture = _class(config.type, row)
    plain = architecture()
    _refuse_unknown(plain, config.config)
    needs_padding = row is not None and row.needs_padding
    # None too: the architecture's own defaults are of another vocabulary (OPT's padding, id 1, would never be trained)
    settings: dict[str, Any] = {key: one for key, one in token_ids.items() if one is not None or not needs_padding}
    if config.pad_vocab_to_multiple_of and settings.get("vocab_size"):
        settings["vocab_size"] = padded(settings["vocab_size"], config.pad_vocab_to_multiple_of)
    if row is not None:
        settings |= {**row.scratch, **row.needs}
    if config.preset is not None:
        settings |= preset_settings(config.preset, plain, row)
    settings |= config.config
    if row is not None and isinstance(vocabulary := settings.get("vocab_size", plain.vocab_size), int):
        settings = settings | dict.fromkeys(row.past_vocabulary, vocabulary)
    try:
        return architecture(**settings)
    except (TypeError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"model.config={config.config} does not fit {config.type}: {said}; correct it") from None


def padded(vocab_size: int, multiple: int) -> int:
    """The next multiple: matrices of such sizes are faster on GPUs."""
    return -(-vocab_size // multiple) * multiple


def row_of(built: Any) -> Architecture | None:
    """What the table knows of a configuration's architecture."""
    return _row(built.model_type)


def _row(name: str) -> Architecture | None:
    return BY_TYPE.get(_CALLED.get(name, name))


def told(built: Any) -> str | None:
    """What a model was told to be a left-to-right one of text, as a line for the screen; None: nothing, or otherwise."""
    row = row_of(built)
    if row is None or not row.needs or any(getattr(built, key) != value for key, value in row.needs.items()):
        return None
    settings = ", ".join(f"{key}={value}".lower() for key, value in row.needs.items())
    padding = f"; id {built.pad_token_id} is padding to it wherever it stands" if row.needs_padding else ""
    return f"{row.name} as a left-to-right language model: {settings}{padding} (docs/architectures.md)"


def idle_experts(built: Any) -> bool:
    """Whether experts are modules of their own (transformers 4.57), so that one without a token has no gradient; 5 holds
    all experts of a layer in one tensor."""
    counts = [getattr(built.get_text_config(), name, None) for name in EXPERTS]
    return transformers_versions.MAJOR < 5 and any(isinstance(one, int) and one > 1 for one in counts)


def away_from_home(built: Any) -> list[str]:
    """What whoever loads an exported model without this package has to know, in sentences."""
    row = row_of(built)
    if row is None:
        return []
    said = []
    if row.classes is not None:
        said.append(f"AutoModelForCausalLM does not load it; transformers.{row.classes[1]}.from_pretrained does.")
    if row.repair is not None:
        said.append(
            f"The code of transformers for {row.name} was mended in training and computes otherwise as it comes: load it by "
            "clm_dist.model.build.load_model."
        )
    if not row.generates:
        said.append(
            f"transformers' own `generate` does not say what a {row.name} predicts; `clm-dist generate` of its folder does."
        )
    return said


def load_configuration(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a folder or Hub id, told to be a left-to-right model; UserError where there is none."""
    from transformers import AutoConfig, PretrainedConfig

    try:
        where = hub.resolve_model(name, revision)
        values, _ = PretrainedConfig.get_config_dict(name, **where)
        row = _row(values.get("model_type", ""))
        _refuse_elsewhere(row, f"{name} ({row.name if row else None})")
        if row is not None and row.classes is not None:
            plain = transformers_versions.named(row.classes[0]).from_pretrained(name, **where)
        else:
            plain = AutoConfig.from_pretrained(name, **where, trust_remote_code=trust_remote_code)
        for key, value in row.needs.items() if row else ():
            setattr(plain, key, value)
        return plain
    except (OSError, ValueError) as error:
        remedy = "or give a folder with config.json as model.name"
        raise hub.refused(error, "model", name, revision, "model.name", remedy) from None


def _class(type_: str, row: Architecture | None) -> Any:
    """That of the configuration of a type; UserError where there is none that makes a causal language model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if row is not None and row.classes is not None:
        return transformers_versions.named(row.classes[0])
    name = _BUILT_AS.get(type_, type_)
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if name in CONFIG_MAPPING:
            raise UserError(
                f"model.type={type_} is no causal language model: transformers has no head for it that predicts text; "
                "take one of `clm-dist architectures`"
            )
        here = {one for one in BY_TYPE if transformers_versions.MAJOR in BY_TYPE[one].lives}
        known = nearest(type_, here | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        which = known if known.startswith("; did") else "; `clm-dist architectures` lists them"
        raise UserError(f"model.type={type_} is no causal language model that transformers knows{which}")
    return CONFIG_MAPPING[name]


def _refuse_elsewhere(row: Architecture | None, given: str) -> None:
    """UserError for an architecture that this version of transformers has not."""
    if row is not None and transformers_versions.MAJOR not in row.lives:
        raise UserError(transformers_versions.elsewhere(given, row))


def _refuse_unknown(built: Any, settings: dict[str, Any]) -> None:
    """transformers takes any key in silence; a misspelt one would train another model than was asked for."""
    known = {key for key in dir(built) if not key.startswith("_") and not callable(getattr(type(built), key, None))}
    known |= set(built.attribute_map)
    unknown = {key: nearest(key, known) for key in settings if key not in known}
    problems = [f"unknown key model.config.{key}{close}" for key, close in unknown.items() if close.startswith("; did")]
    strange = [key for key, close in unknown.items() if not close.startswith("; did")]
    if strange:
        problems.append(
            f"model.config has {', '.join(strange)}, which {built.model_type} does not know (its sizes: "
            f"{', '.join(size_names(built))}); leave them out, or write model.config={{}} where they come from another "
            "architecture's recipe"
        )
    if problems:
        raise ConfigError(problems)
