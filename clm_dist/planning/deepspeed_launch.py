"""Whether DeepSpeed was asked for, where its configuration stands, and whether the launcher says the same. Pure.

Three ways lead here: `deepspeed_config_file` of an Accelerate YAML, fields inside such a YAML (Accelerate's launcher hands
both on as variables of the environment), and CLM_DIST_DEEPSPEED, which `clm-dist train --deepspeed FILE` sets.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_dist.config import Config
from clm_dist.errors import ConfigError
from clm_dist.planning.deepspeed_checks import ZERO, at, shown

OWN_VARIABLE = "CLM_DIST_DEEPSPEED"
FILE_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
INLINE = "the accelerate configuration"
REMEDY = "launch with --config_file accelerate_configs/zero2.yaml"
# Accelerate's variables for fields of a YAML, and what they would be in a file.
FIELDS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", f"{ZERO}.stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "offload_optimizer_device",
        f"{ZERO}.offload_optimizer.device",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", f"{ZERO}.offload_param.device"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": (
        "offload_optimizer_nvme_path",
        f"{ZERO}.offload_optimizer.nvme_path",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": ("offload_param_nvme_path", f"{ZERO}.offload_param.nvme_path"),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (
        "zero3_save_16bit_model",
        f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
    ),
}


@dataclass(frozen=True)
class Launched:
    """The DeepSpeed configuration that a launch names, as it was written."""

    source: str  # for messages: the path of the file, or INLINE
    values: dict[str, Any]

    @property
    def inline(self) -> bool:
        """Whether fields of the Accelerate YAML stand for the file."""
        return self.source == INLINE


def launched(environment: Mapping[str, str]) -> Launched | None:
    """The configuration that this launch names; None where DeepSpeed was not asked for."""
    by_accelerate = is_true(environment, "ACCELERATE_USE_DEEPSPEED")
    own = environment.get(OWN_VARIABLE)
    theirs = environment.get(FILE_VARIABLE, "none") if by_accelerate else "none"
    if own and theirs not in ("none", own):
        raise ConfigError(
            [
                f"--deepspeed {own} but the accelerate configuration names deepspeed_config_file={theirs}; give one of them"
            ]
        )
    if own or theirs != "none":
        path = own or theirs
        return Launched(path, read(path))
    return Launched(INLINE, _from_fields(environment)) if by_accelerate else None


def read(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON; a ConfigError where it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ConfigError([f"{path}: {reason}; name a DeepSpeed JSON, e.g. ds_configs/zero2.json"]) from None
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, column {error.colno}"
        raise ConfigError([f"{path}: {line} is no JSON: {error.msg}; correct it (JSON has no comments)"]) from None
    except _Twice as twice:
        raise ConfigError([f"{path}: the key {twice} stands there twice; keep one of them"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: {shown(values)} is no section; write an object as in ds_configs/zero2.json"])
    return values


class _Twice(Exception):  # noqa: N818 - it never leaves this file
    """A key that a section has twice: Python would keep the last, in silence."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _Twice(name)
    return dict(pairs)


def is_true(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes, in the spellings that Accelerate takes."""
    return environment.get(name, "").lower() in ("true", "1", "yes", "y", "on", "t")


def _from_fields(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a file would say that has the fields of the YAML, and leaves the rest to the recipe."""
    # 2 is what Accelerate takes where none is given
    zero: dict[str, Any] = {"stage": _value(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    zero["reduce_bucket_size"] = "auto"
    if zero["stage"] == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    values: dict[str, Any] = {ZERO: zero}
    for variable, (_, path) in FIELDS.items():
        given = environment.get(variable, "none")
        if given == "none" or variable == "ACCELERATE_DEEPSPEED_ZERO_STAGE":
            continue
        # `false` is what Accelerate's questionnaire writes for stages that have no use for it
        if path.endswith("model_save") and (zero["stage"] != 3 or given == "auto"):
            continue
        *_, section, key = path.split(".")
        (zero if section == ZERO else zero.setdefault(section, {}))[key] = _value(given)
    return values


def _value(text: str) -> Any:
    """2 of "2", true of "true"; a text that is neither stays one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def installed() -> bool:
    """Whether DeepSpeed can be imported here, found out without doing so."""
    return importlib.util.find_spec("deepspeed") is not None


def launch_problems(
    environment: Mapping[str, str],
    found: Launched,
    config: Config,
    *,
    world_size: int,
    gradient_accumulation_steps: int,
    device: str,
) -> list[str]:
    """Where the launcher says otherwise than the file, the recipe or the machine; each with its remedy."""
    return [
        *_about_the_machine(environment, world_size, device),
        *_about_the_recipe(environment, config, gradient_accumulation_steps),
        *(() if found.inline else _about_the_file(environment, found)),
    ]


def _about_the_machine(environment: Mapping[str, str], world_size: int, device: str) -> Iterator[str]:
    if not installed():
        yield "DeepSpeed was asked for but is not installed; pip install 'clm-dist[deepspeed]', or launch with ddp.yaml"
    if is_true(environment, "ACCELERATE_USE_CPU"):
        yield (
            "the launcher says use_cpu=true, with which Accelerate drops DeepSpeed in silence; leave use_cpu out: "
            "where there is no GPU, processes on the CPU are started"
        )
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        yield (
            "the launcher asks for FSDP (ACCELERATE_USE_FSDP=true) and for DeepSpeed, which both shard the model; launch "
            "with one accelerate configuration: fsdp2.yaml or one of zero*.yaml"
        )
    accelerator = environment.get("DS_ACCELERATOR")
    if accelerator is not None and accelerator != device:  # where it is not set, we set it
        yield f"DS_ACCELERATOR={accelerator} but the run is on {device}; unset it in the environment"
    launched_size = environment.get("WORLD_SIZE")
    if launched_size is None:
        yield f"DeepSpeed needs a launcher, for one process too, and WORLD_SIZE is not set; {REMEDY}"
    elif launched_size != str(world_size):
        yield (
            f"WORLD_SIZE={launched_size} processes were launched but the run was planned for {world_size}; set "
            f"--num_processes {world_size}"
        )
    if is_true(environment, "ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        yield (
            "the launcher says zero3_init_flag=true, but a model is built whole on every process before it is sharded, so "
            "that it starts from the same weights at every world size; set zero3_init_flag: false"
        )


def _about_the_recipe(environment: Mapping[str, str], config: Config, accumulation: int) -> Iterator[str]:
    owner = "leave it out of the accelerate configuration: the recipe owns it"
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.train.mixed_precision):
        own = config.train.mixed_precision
        yield f"the launcher says mixed_precision={precision} but train.mixed_precision={own}; {owner}"
    clipping, norm = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto"), config.optim.max_grad_norm
    if clipping not in ("auto", "none") and _value(clipping) != (norm or 0.0):
        yield f"the launcher says gradient_clipping={clipping} but optim.max_grad_norm={shown(norm)}; {owner}"
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    # 1 is also what Accelerate puts where nothing was said
    if steps not in ("auto", "none", "1", str(accumulation)):
        yield (
            f"the launcher says gradient_accumulation_steps={steps} but the recipe makes it {accumulation} "
            f"(train.global_batch_size={config.train.global_batch_size}); {owner}"
        )


def _about_the_file(environment: Mapping[str, str], found: Launched) -> Iterator[str]:
    """Fields of the YAML beside a file: two places for one number, even where they agree."""
    for variable, (field, path) in FIELDS.items():
        given = environment.get(variable)
        if given is None or (given in ("none", "auto") and at(found.values, path) in (None, "none")):
            continue
        yield (
            f"the accelerate configuration says {field}={given} and {found.source} {path}={shown(at(found.values, path))}; "
            f"leave {field} out: the file owns it"
        )
