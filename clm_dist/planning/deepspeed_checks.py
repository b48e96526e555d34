"""What a DeepSpeed configuration can be wrong about: by itself, and against the recipe. Pure.

Every problem is one sentence with what was given, what is needed and what to do.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clm_dist.config import Config
from clm_dist.errors import nearest
from clm_dist.planning.deepspeed_refusals import REFUSED
from clm_dist.planning.deepspeed_schema import AUTO, SCHEMA, Schema

ZERO = "zero_optimization"
OF_THE_WIDTH = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


# What the two blocks would set beside the recipe.
BLOCKS = {
    "optimizer": {
        "lr": "optim.lr",
        "betas": "optim.beta1, optim.beta2",
        "eps": "optim.eps",
        "weight_decay": "optim.weight_decay",
    },
    "scheduler": {
        "warmup_max_lr": "optim.lr",
        "warmup_num_steps": "optim.warmup_steps",
        "total_num_steps": "train.max_steps",
    },
}

# DeepSpeed's schedulers, by the schedule that takes the same course.
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


@dataclass(frozen=True)
class Run:
    """A recipe on so many processes: all that a DeepSpeed configuration has to agree with."""

    config: Config
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    hidden_size: int | None  # of the model; None where it has no single one
    device: str  # cpu or cuda

    def owned(self) -> dict[str, tuple[Any, str]]:
        """Path of each key that the recipe owns: its value, and where that comes from."""
        train, norm = self.config.train, self.config.optim.max_grad_norm
        precision = f"train.mixed_precision={train.mixed_precision}"
        product = f"{self.world_size} processes x {self.micro_batch_size} sequences"
        whole = f"train.global_batch_size={train.global_batch_size}"
        return {
            "train_batch_size": (
                train.global_batch_size,
                f"{whole} ({product} x {self.gradient_accumulation_steps} accumulation)",
            ),
            "train_micro_batch_size_per_gpu": (
                self.micro_batch_size,
                f"train.micro_batch_size={self.micro_batch_size}",
            ),
            "gradient_accumulation_steps": (
                self.gradient_accumulation_steps,
                f"{self.gradient_accumulation_steps} follows from {whole} / ({product})",
            ),
            "gradient_clipping": (norm or 0.0, f"optim.max_grad_norm={shown(norm)}"),
            "bf16.enabled": (train.mixed_precision == "bf16", precision),
            "fp16.enabled": (train.mixed_precision == "fp16", precision),
        }


def shown(value: Any) -> str:
    """As it stands in JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def at(values: dict[str, Any], path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def understood(values: dict[str, Any], schema: Schema = SCHEMA, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """The part of `values` that is known and of the right kind, and what is wrong with the rest."""
    sound: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        path, kind = prefix + key, schema.get(key)
        if refusal := REFUSED.get(path):
            if value is not None and not refusal.unless(value):
                problems.append(f"{path}={shown(value)} is refused: {refusal.reason}")
        elif key in ("optimizer", "scheduler") and not prefix:
            sound[key] = value  # said by of_the_recipe, with the fields that own what is in it
        elif kind is None:
            beside = [one[len(prefix) :] for one in REFUSED if one.startswith(prefix)]
            names = [*schema, *(name for name in beside if "." not in name), *([] if prefix else BLOCKS)]
            problems.append(f"unknown key {path}, which DeepSpeed may pass over in silence{nearest(key, names)}")
        elif value is None:
            continue  # as if it were not there, to DeepSpeed too
        elif isinstance(kind, dict):
            if isinstance(value, dict):
                sound[key], inner = understood(value, kind, f"{path}.")
                problems += inner
            else:
                problems.append(f"{path}={shown(value)} must be a section; write {{{', '.join(list(kind)[:3])}, ...}}")
        elif value == "auto" and path not in AUTO:
            problems.append(f'{path}="auto" has no value in a recipe; write {kind.words}, or leave the key out')
        elif value == "auto" or kind.fits(value):
            sound[key] = int(value) if kind.whole and value != "auto" else value
        else:
            problems.append(f"{path}={shown(value)} must be {kind.words}; correct it, or leave the key out")
    return sound, problems


def of_the_recipe(sound: dict[str, Any], run: Run) -> Iterator[str]:
    """Where the configuration says otherwise than the recipe."""
    for path, (value, owner) in run.owned().items():
        given = at(sound, path)
        if given not in (None, "auto") and given != value:
            yield f'{path}={shown(given)} but {owner}; write "auto", or change the recipe'
    for block, owners in BLOCKS.items():
        if sound.get(block) is not None:
            yield _block(block, sound[block], owners, run.config)
    precision = run.config.train.mixed_precision
    summed = at(sound, "data_types.grad_accum_dtype")
    first_in_16_bits = precision in ("bf16", "fp16") and at(sound, f"{ZERO}.stage") == 1
    if first_in_16_bits and summed not in (None, precision):
        yield (
            f"data_types.grad_accum_dtype={shown(summed)} at stage 1 with train.mixed_precision={precision} would bring in "
            "an optimizer of DeepSpeed's that is not supported; use stage 2, which adds up in fp32, or leave the key out"
        )
    elif not first_in_16_bits and summed not in (None, "fp32"):
        yield (
            f"data_types.grad_accum_dtype={shown(summed)} would add gradients up in {summed}, but sums are fp32 at every "
            f'train.mixed_precision (here {precision}); write "fp32" or leave the key out'
        )
    own = "fp32" if precision == "no" else precision
    weights = at(sound, "data_types.param_dtype")
    if weights not in (None, own):
        yield (
            f"data_types.param_dtype={shown(weights)} but train.mixed_precision={precision} computes in {own}; "
            "leave the key out"
        )
    sent = sound.get("communication_data_type")
    if sent not in (None, "fp32", own):
        choices = " or ".join(dict.fromkeys([own, "fp32"]))
        yield (
            f"communication_data_type={shown(sent)} but train.mixed_precision={precision} computes in {own}; "
            f"write {choices}, or leave the key out"
        )


def _block(block: str, given: Any, owners: dict[str, str], config: Config) -> str:
    """Both values of each setting in an optimizer or scheduler block that the recipe owns."""
    params = given.get("params", {}) if isinstance(given, dict) else {}
    pairs = []
    for key, fields in owners.items():
        if isinstance(params, dict) and params.get(key, "auto") != "auto":
            ours = [f"{field}={shown(at(config.model_dump(), field))}" for field in fields.split(", ")]
            pairs.append(f"{key}={shown(params[key])} there, {' and '.join(ours)} here")
    name = shown(given.get("type")) if isinstance(given, dict) else shown(given)
    told = f" ({'; '.join(pairs)})" if pairs else ""
    owners_of = {"optimizer": "AdamW is set by optim.*", "scheduler": "the learning rate is optim.schedule's"}
    course = SCHEDULES.get(str(given.get("type"))) if isinstance(given, dict) else None
    other = course is not None and course != config.optim.schedule
    remedy = f"and set optim.schedule={course} for the same course" if other else "and keep the recipe's settings"
    return f"the {block} block of type {name}{told}: {owners_of[block]}; remove the block, {remedy}"


def of_the_stage(sound: dict[str, Any]) -> Iterator[str]:
    """Whether stage, offloading and sizes go together."""
    zero = sound.get(ZERO, {})
    stage = zero.get("stage")
    if stage in (None, 0):
        yield (
            f"{ZERO}.stage={shown(stage)} shards nothing; set 1, 2 or 3, or launch with accelerate_configs/ddp.yaml, "
            "which needs no DeepSpeed"
        )
        return
    for key, value in zero.items():
        if key.startswith("stage3_") and stage != 3:
            yield f"{ZERO}.{key}={shown(value)} is for stage 3, but {ZERO}.stage={stage}; leave it out or set stage 3"
    parameters, states = at(zero, "offload_param.device"), at(zero, "offload_optimizer.device")
    if parameters not in (None, "none") and stage != 3:
        yield (
            f"{ZERO}.offload_param.device={shown(parameters)} needs {ZERO}.stage=3, given is {stage}: only stage 3 shards "
            "parameters; leave offload_param out or set stage 3"
        )
    if states == "nvme" and stage != 3:
        yield (
            f"{ZERO}.offload_optimizer.device=nvme needs {ZERO}.stage=3, given is {stage}, which would take it for cpu; "
            "write cpu or set stage 3"
        )
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name, {})
        if section.get("device") == "nvme" and stage == 3 and section.get("nvme_path"):
            yield (
                f"{ZERO}.{name}.device=nvme: what lies on a disk cannot be put into a checkpoint yet, and every run saves; "
                "write cpu"
            )
        if section.get("device") == "nvme" and not section.get("nvme_path"):
            yield f"{ZERO}.{name}.device=nvme without nvme_path; add the path of a folder on a local disk"
        if section.get("device") != "nvme" and section.get("nvme_path") not in (None, "none"):
            yield (
                f"{ZERO}.{name}.nvme_path={shown(section['nvme_path'])} but device={shown(section.get('device'))}; write "
                "device nvme or leave the path out"
            )
    bucket = zero.get("allgather_bucket_size")
    if isinstance(bucket, int) and bucket % 2:
        yield f"{ZERO}.allgather_bucket_size={bucket} must be even for DeepSpeed; write {max(2, bucket - 1)}"
    ahead = zero.get("stage3_prefetch_bucket_size")
    if zero.get("stage3_allgather_sequential") and ahead not in (None, 1):
        yield (
            f"{ZERO}.stage3_prefetch_bucket_size={shown(ahead)} but stage3_allgather_sequential=true, with which DeepSpeed "
            "takes 1; leave one of them out"
        )
    if zero.get("stage3_gather_16bit_weights_on_model_save") is False and stage == 3:
        yield (
            f"{ZERO}.stage3_gather_16bit_weights_on_model_save=false, but exports hold whole weights, which are gathered "
            'one parameter at a time; write "auto" or true'
        )


def of_the_device(sound: dict[str, Any], run: Run) -> Iterator[str]:
    """What the model or the machine does not have."""
    if run.config.train.mixed_precision == "fp16" and run.device == "cpu":
        yield "train.mixed_precision=fp16 needs a GPU, and the run is on cpu; set train.mixed_precision=bf16 or no"
    automatic = [name for name in OF_THE_WIDTH if at(sound, f"{ZERO}.{name}") == "auto"]
    if automatic and run.hidden_size is None:
        yield (
            f'{ZERO}.{", ".join(automatic)}="auto" goes by the hidden size of the model, which it does not tell; write '
            "numbers of elements, e.g. 5e7"
        )
