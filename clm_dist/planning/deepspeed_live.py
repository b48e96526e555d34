"""Whether a live DeepSpeed engine holds what was resolved: the last place where a number can go astray. No torch."""

from typing import Any

from clm_dist.config import OptimConfig
from clm_dist.planning.deepspeed_checks import ZERO, at, shown

# Path in the configuration: the engine's own word for it, then where a part of the engine holds a copy. Parts differ with
# stage and precision (ZeRO-1 in bf16 has no reduce bucket): a copy that is not there is passed over, the word is not.
PLACES = {
    "train_batch_size": ("train_batch_size",),
    "train_micro_batch_size_per_gpu": ("train_micro_batch_size_per_gpu",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", "optimizer.gradient_accumulation_steps"),
    "gradient_clipping": ("gradient_clipping", "optimizer.clip_grad"),
    "bf16.enabled": ("bfloat16_enabled",),
    "fp16.enabled": ("fp16_enabled",),
    f"{ZERO}.stage": ("zero_optimization_stage",),
    f"{ZERO}.reduce_bucket_size": ("zero_reduce_bucket_size", "optimizer.reduce_bucket_size"),
    f"{ZERO}.allgather_bucket_size": ("zero_allgather_bucket_size", "optimizer.allgather_bucket_size"),
    f"{ZERO}.stage3_prefetch_bucket_size": ("zero_prefetch_bucket_size", "optimizer.prefetch_elements"),
    f"{ZERO}.stage3_param_persistence_threshold": (
        "zero_param_persistence_threshold",
        "optimizer.parameter_offload.param_numel_persistence_threshold",
    ),
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": ("zero_gather_16bit_weights_on_model_save",),
    f"{ZERO}.offload_optimizer.device": ("zero_offload_optimizer.device",),
    f"{ZERO}.offload_param.device": ("zero_offload_param.device",),
}
# Whether states or parameters are offloaded, as the parts of the engine say it: true or false.
OFFLOADED = {
    f"{ZERO}.offload_optimizer.device": ("optimizer.cpu_offload", "optimizer.offload_optimizer"),
    f"{ZERO}.offload_param.device": ("optimizer.offload_param",),
}
NOT_THERE = object()


def live_differences(resolved: dict[str, Any], engine: Any) -> list[str]:
    """Where `engine` differs from the resolved configuration; empty if nowhere."""
    differences = []
    for path, (word, *copies) in PLACES.items():
        wanted = at(resolved, path)
        if wanted is None and not path.endswith(".device"):
            continue  # nobody chose it: DeepSpeed's own default
        for place in (word, *copies):
            got = _held(engine, place)
            if got is NOT_THERE and (place != word or wanted is None):
                continue
            if got is NOT_THERE or not _same(got, wanted):
                differences.append(_difference(path, wanted, place, got))
    for path, places in OFFLOADED.items():
        wanted = at(resolved, path) is not None
        for place in places:
            got = _held(engine, place)
            if got is not NOT_THERE and bool(got) != wanted:
                differences.append(_difference(path, at(resolved, path), place, got))
    return differences


def optimizer_differences(groups: list[dict[str, Any]], optim: OptimConfig) -> list[str]:
    """Where a group of parameters has other settings than the recipe. Of two groups the first decays (optimizer.py)."""
    wanted = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    differences = []
    for number, group in enumerate(groups):
        place = f"optimizer.param_groups[{number}]"
        for name, value in wanted.items():
            got = group.get(name, NOT_THERE)
            got = tuple(got) if isinstance(got, list) else got
            if got != value:
                differences.append(_difference(f"optim.{name}", value, f"{place}.{name}", got))
        decay, wanted_decay = group.get("weight_decay", NOT_THERE), 0.0 if number else optim.weight_decay
        if decay != wanted_decay:
            differences.append(_difference("optim.weight_decay", wanted_decay, f"{place}.weight_decay", decay))
    return differences


def _held(engine: Any, place: str) -> Any:
    """What stands at a dotted place; methods on the way are called."""
    for name in place.split("."):
        engine = getattr(engine, name, NOT_THERE)
        if engine is NOT_THERE or engine is None:
            return NOT_THERE
        engine = engine() if callable(engine) else engine
    return NOT_THERE if engine is None else engine


def _same(got: Any, wanted: Any) -> bool:
    return bool(got == wanted) or (wanted is None and got == "none")


def _difference(path: str, wanted: Any, place: str, got: Any) -> str:
    held = "nothing" if got is NOT_THERE else shown(got) if isinstance(got, int | float | str) else repr(got)
    return f"{path} was resolved to {shown(wanted)} but the live engine holds {held} ({place})"
