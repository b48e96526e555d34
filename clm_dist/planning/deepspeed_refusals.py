"""Keys of a DeepSpeed configuration that a run may not set, and why. Pure.

Each would change what is learned, or do nothing where it seems to do something. `unless` names the values that change
nothing: they are let pass and left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """Why a key is refused and what to do instead; `unless` says which values are harmless."""

    reason: str
    unless: Callable[[Any], bool] = lambda value: False


def _off(value: Any) -> bool:
    """`false`, or a section that is not enabled."""
    return value is False or (isinstance(value, dict) and value.get("enabled", False) is False and "enabled" in value)


def _is(harmless: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float, bool) and value == harmless


_REMOVED = "DeepSpeed has removed it and would stop; leave the key out"
_ONE_COPY = "a run is data-parallel: every process holds a whole sequence and the whole width; leave the key out"
_AVERAGE = "gradients are scaled by the tokens of the global step and averaged once; leave the key out"
_LOSSY = "it rounds what processes send each other, and the result is no longer that of one process; leave the key out"
_MONITOR = "metrics go to metrics.jsonl and to track.trackers; leave the block out and set track.trackers"
_FP32 = "weights and moments stay fp32 at every train.mixed_precision; leave the key out"
_CPU_ADAM = "it needs DeepSpeed's own Adam, and a run takes torch's AdamW; leave the key out"
_RENAMED = "DeepSpeed has renamed it; write"

REFUSED: dict[str, Refusal] = {
    "zero_allow_untested_optimizer": Refusal(
        "the optimizer is torch's AdamW, which DeepSpeed takes with true only; leave the key out", _is(True)
    ),
    "zero_force_ds_cpu_optimizer": Refusal(
        "the optimizer is torch's AdamW, also where its states are offloaded; DeepSpeed's own would be compiled at start; "
        "leave the key out",
        _off,
    ),
    "bfloat16": Refusal(f"{_RENAMED} bf16"),
    "torch_autocast": Refusal("train.mixed_precision owns the precision; leave the block out", _off),
    "amp": Refusal(f"{_REMOVED}; train.mixed_precision owns the precision"),
    "elasticity": Refusal(f"{_REMOVED}; train.global_batch_size holds at every number of processes"),
    "compression_training": Refusal(_REMOVED),
    "sparse_gradients": Refusal(_REMOVED),
    "sparse_attention": Refusal(_REMOVED),
    "eigenvalue": Refusal(_REMOVED),
    "quantize_training": Refusal(_REMOVED),
    "graph_harvesting": Refusal(_REMOVED),
    "nebula": Refusal(f"{_REMOVED}; checkpoints are the recipe's (checkpoint.save_every)"),
    "curriculum_learning": Refusal(f"{_REMOVED}; the order of the data is a function of seed and step"),
    "progressive_layer_drop": Refusal(_REMOVED),
    "data_efficiency": Refusal(
        "the order of the data is a function of seed and step and of nothing else; leave the block out", _off
    ),
    "dataloader_drop_last": Refusal("DeepSpeed loads no data here, it would do nothing; leave the key out"),
    "prescale_gradients": Refusal(_AVERAGE, _off),
    "gradient_predivide_factor": Refusal(_AVERAGE, _is(1)),
    "gradient_allreduce_op": Refusal(_AVERAGE, lambda value: value == "mean"),
    "disable_allgather": Refusal("processes would train on different weights; leave the key out", _off),
    "managed_gradient_accumulation": Refusal(
        "DeepSpeed has to know the last micro-step of a step; leave the key out", _is(True)
    ),
    "tensor_parallel": Refusal(_ONE_COPY),
    "pipeline": Refusal(_ONE_COPY),
    "sequence_parallel_size": Refusal(_ONE_COPY, _is(1)),
    "seq_parallel_communication_data_type": Refusal(_ONE_COPY),
    "expert_parallel": Refusal(_ONE_COPY, _off),
    "use_data_before_expert_parallelism": Refusal(_ONE_COPY, _off),
    "checkpoint": Refusal("checkpoints are the recipe's (checkpoint.save_every and beside it); leave the block out"),
    "datastates_ckpt": Refusal("checkpoints are the recipe's (checkpoint.asynchronous); leave the block out", _off),
    "hybrid_engine": Refusal("it is for generation while training, which no run does; leave the block out", _off),
    "autotuning": Refusal("it starts runs of its own with other batches; leave the block out", _off),
    "weight_quantization": Refusal(_FP32),
    "compile": Refusal("DeepSpeed's compiler is not among what runs are proved with; leave the block out"),
    "activation_checkpointing": Refusal("models of transformers do not call it, it would do nothing; leave it out"),
    "tensorboard": Refusal(_MONITOR, _off),
    "wandb": Refusal(_MONITOR, _off),
    "csv_monitor": Refusal(_MONITOR, _off),
    "comet": Refusal(_MONITOR, _off),
    "bf16.bf16_master_weights_and_grads": Refusal(_FP32, _off),
    "bf16.bf16_optimizer_states": Refusal(_FP32, _off),
    "fp16.fp16_master_weights_and_grads": Refusal(_FP32, _off),
    "zero_optimization.compute_grad_norm": Refusal(
        "every log line shows the gradient norm, and clipping needs it; leave the key out", _is(True)
    ),
    "zero_optimization.zero_quantized_weights": Refusal(_LOSSY, _off),
    "zero_optimization.zero_quantized_nontrainable_weights": Refusal(_LOSSY, _off),
    "zero_optimization.zero_quantized_gradients": Refusal(_LOSSY, _off),
    "zero_optimization.zero_hpz_partition_size": Refusal(
        "a second, partial copy of the weights is not among what runs are proved with; leave the key out",
        lambda value: _is(0)(value) or _is(1)(value),
    ),
    "zero_optimization.zenflow": Refusal("it updates some weights later than others; leave the block out"),
    "zero_optimization.round_robin_gradients": Refusal(
        "partitions then lie in another order than DeepSpeed's own books say, by which checkpoints are written; leave the "
        "key out",
        _off,
    ),
    "data_types.buffer_dtype": Refusal(
        "buffers, such as the frequencies of rotary positions, stay as they are exported; leave the key out",
        lambda value: value == "fp32",
    ),
    "zero_optimization.mics_shard_size": Refusal(_REMOVED),
    "zero_optimization.mics_hierarchical_params_gather": Refusal(_REMOVED),
    "zero_optimization.zeropp_loco_param": Refusal(_REMOVED),
    "zero_optimization.legacy_stage1": Refusal(_REMOVED, _off),
    "zero_optimization.elastic_checkpoint": Refusal(
        "checkpoints are the recipe's (checkpoint.save_every); leave the key out", _off
    ),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Refusal(
        "it is for another optimizer, and a run takes AdamW; leave the key out", _off
    ),
    "zero_optimization.cpu_offload": Refusal(f'{_RENAMED} offload_optimizer: {{"device": "cpu"}}', _off),
    "zero_optimization.cpu_offload_param": Refusal(f'{_RENAMED} offload_param: {{"device": "cpu"}}', _off),
    "zero_optimization.cpu_offload_use_pin_memory": Refusal(
        f"{_RENAMED} pin_memory in offload_optimizer and offload_param"
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": Refusal(
        f"{_RENAMED} stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.offload_optimizer.ratio": Refusal(_CPU_ADAM, _is(1)),
    "zero_optimization.offload_optimizer.super_offload": Refusal(_CPU_ADAM, _off),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": Refusal(_CPU_ADAM),
}
