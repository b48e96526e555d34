"""The keys of a DeepSpeed configuration that a run may set, and what each may hold. Pure.

DeepSpeed reads unknown keys at the top, and in several sections, as if they were not there. This table is ours and not
read from DeepSpeed's own models, so that a configuration can be checked where DeepSpeed is not installed;
tests/test_deepspeed_schema.py holds it against those models. Keys that a run may not set stand in
deepspeed_refusals.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words and as a question."""

    words: str
    fits: Callable[[Any], bool]
    whole: bool = False  # a whole number, which JSON gives as a float where it is written 5e8


Schema = dict[str, "Kind | Schema"]


def is_number(value: Any) -> bool:
    """A finite number; `true` is none, although Python counts it as 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """A whole number, also written as 5e8, which JSON gives as a float."""
    return is_number(value) and value == int(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _one_of(*choices: str) -> Kind:
    return Kind("one of " + ", ".join(choices), lambda value: value in choices)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SIZE = Kind("a whole number above 0", lambda value: is_whole(value) and value > 0, whole=True)
WHOLE = Kind("a whole number of at least 0", lambda value: is_whole(value) and value >= 0, whole=True)
INTEGER = Kind("a whole number", is_whole, whole=True)
AMOUNT = Kind("a number of at least 0", lambda value: is_number(value) and value >= 0)
TEXT = Kind("a text", lambda value: isinstance(value, str))
NAMES = Kind("a list of texts", _is_names)
STAGE = Kind("1, 2 or 3", lambda value: is_whole(value) and value in (0, 1, 2, 3), whole=True)
DEVICE = _one_of("none", "cpu", "nvme")
DTYPE = _one_of("fp32", "bf16", "fp16")

OFFLOAD_PARAM: Schema = {
    "device": DEVICE,
    "nvme_path": TEXT,
    "buffer_count": WHOLE,
    "buffer_size": WHOLE,
    "max_in_cpu": WHOLE,
    "pin_memory": FLAG,
}
OFFLOAD_OPTIMIZER: Schema = {
    "device": DEVICE,
    "nvme_path": TEXT,
    "buffer_count": WHOLE,
    "pin_memory": FLAG,
    "pipeline_read": FLAG,
    "pipeline_write": FLAG,
    "fast_init": FLAG,
}
ZERO: Schema = {
    "stage": STAGE,
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": SIZE,
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": FLAG,
    "allgather_bucket_size": SIZE,
    "overlap_comm": FLAG,
    "load_from_fp32_weights": FLAG,
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "sub_group_size": SIZE,
    "stage3_prefetch_bucket_size": WHOLE,
    "stage3_param_persistence_threshold": WHOLE,
    "stage3_model_persistence_threshold": WHOLE,
    "stage3_max_live_parameters": WHOLE,
    "stage3_max_reuse_distance": WHOLE,
    "stage3_gather_16bit_weights_on_model_save": FLAG,
    "stage3_module_granularity_threshold": WHOLE,
    "stage3_use_all_reduce_for_fetch_params": FLAG,
    "stage3_allgather_sequential": FLAG,
    "ignore_unused_parameters": FLAG,
    "parameter_alignment": FLAG,
    "memory_efficient_linear": FLAG,
    "pipeline_loading_checkpoint": FLAG,
    "override_module_apply": FLAG,
    "log_trace_cache_warnings": FLAG,
    "enable_sanity_checks": FLAG,
    "leaf_module": {"classes": NAMES, "names": NAMES, "name_suffixes": NAMES},
}
SCHEMA: Schema = {
    "train_batch_size": SIZE,
    "train_micro_batch_size_per_gpu": SIZE,
    "gradient_accumulation_steps": SIZE,
    "gradient_clipping": AMOUNT,
    "zero_optimization": ZERO,
    "bf16": {"enabled": FLAG, "immediate_grad_update": FLAG, "check_grad_overflow": FLAG},
    "fp16": {
        "enabled": FLAG,
        "auto_cast": FLAG,
        "loss_scale": AMOUNT,
        "initial_scale_power": WHOLE,
        "loss_scale_window": SIZE,
        "hysteresis": WHOLE,
        "consecutive_hysteresis": FLAG,
        "min_loss_scale": SIZE,
    },
    "data_types": {
        "grad_accum_dtype": DTYPE,
        "param_dtype": DTYPE,
        "keep_in_fp32_modules": NAMES,
    },
    "communication_data_type": DTYPE,
    "aio": {
        "block_size": SIZE,
        "queue_depth": SIZE,
        "intra_op_parallelism": SIZE,
        "single_submit": FLAG,
        "overlap_events": FLAG,
        "use_gds": FLAG,
    },
    "steps_per_print": SIZE,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "disable_python_gc": FLAG,
    "log_level": TEXT,
    "vocabulary_size": SIZE,
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "comms_logger": {"enabled": FLAG, "prof_all": FLAG, "prof_ops": NAMES, "verbose": FLAG, "debug": FLAG},
    "flops_profiler": {
        "enabled": FLAG,
        "recompute_fwd_factor": AMOUNT,
        "profile_step": SIZE,
        "module_depth": INTEGER,
        "top_modules": SIZE,
        "detailed": FLAG,
        "output_file": TEXT,
    },
}
# Where "auto" has one meaning: that of the recipe, or of the model's width.
AUTO = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "fp16.enabled",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    }
)
