"""Run by test_plan_live.py on every rank: the bytes of the tensors that are really alive, for one case after another.

    live_bytes.py CASES.json FOLDER

A case: {"architecture": name in tiny_models.TINY, "strategy": "ddp", "zero1", "zero2" or "zero3", "mixed_precision": ...}.
Each rank writes FOLDER/RANK.json: a list of {accumulating, gradients, parameters, optimizer_states}, in the order of the
cases.
"""

import gc
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from tiny_models import tiny_configuration
from transformers import AutoModelForCausalLM
from transformers.integrations import unset_hf_deepspeed_config

from clm_dist.config import OptimConfig
from clm_dist.training.optimizer import make_optimizer

BUCKET = 50_000  # elements; DeepSpeed's own half a billion are two gigabytes a rank
PERSISTENT = 100  # elements: some biases are larger, some not
ROWS, TOKENS = 2, 8


def storages(tensors):
    """Bytes of the storages behind these tensors, each counted once."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().nbytes():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def parameters_of(model):
    for parameter in model.parameters():
        yield parameter.data
        yield getattr(parameter, "ds_tensor", None)  # this rank's part under stage 3


def gradients_of(model, engine):
    """Whatever of this step's gradient waits for the update: of parameters, and of DeepSpeed's partitions."""
    for parameter in model.parameters():
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in (getattr(engine, name, None) or {}).values():
            yield from group or []
    yield getattr(engine, "grad_partitions_flat_buffer", None)
    yield from getattr(engine, "fp32_groups_gradients_flat", [])  # DeepSpeed's BF16_Optimizer


def states_of(optimizer, engine, model):
    """Moments and step counts, and the fp32 master copy where there is one."""
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters_of(model) if tensor is not None}
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        for master in getattr(engine, name, []):
            if master.untyped_storage().data_ptr() not in own:
                yield master


def accelerator_for(case):
    AcceleratorState._reset_state(reset_partial_state=False)
    if case["strategy"] == "ddp":
        handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        return Accelerator(cpu=True, mixed_precision=case["mixed_precision"], kwargs_handlers=handlers)
    stage = int(case["strategy"].removeprefix("zero"))
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": PERSISTENT}
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": 2,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": case["mixed_precision"] == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        zero3_init_flag=False,
    )
    return Accelerator(
        mixed_precision=case["mixed_precision"],
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def measure(case):
    """The bytes of one case on this rank: gradients before the update, parameters and states after it."""
    # else transformers would cut the model into stage 3's parts while it is built, and one-dimensional are all of them
    unset_hf_deepspeed_config()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_configuration(case["architecture"])).float()
    optimizer = make_optimizer(model, OptimConfig())
    accelerator = accelerator_for(case)
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    prepared, wrapped = accelerator.prepare(model, optimizer)
    engine = None if case["strategy"] == "ddp" else prepared.optimizer
    found = {"accumulating": backward(accelerator, prepared, engine, last=False)}
    found["gradients"] = backward(accelerator, prepared, engine, last=True)
    wrapped.step() if engine is None else prepared.step()
    inner = wrapped.optimizer if engine is None else engine.optimizer
    found["parameters"] = storages(parameters_of(model))
    found["optimizer_states"] = storages(states_of(inner, engine, model))
    if engine is not None:
        prepared.destroy()
    accelerator.free_memory()
    del prepared, wrapped, model, optimizer, engine, inner
    gc.collect()
    return found


def backward(accelerator, prepared, engine, last):
    """One micro-step of two; returns the bytes of gradients that it leaves. What Accelerate does, without the update."""
    ids = torch.randint(0, 50, (ROWS, TOKENS))
    model = prepared if engine is None else prepared.module
    with nullcontext() if last or engine is not None else accelerator.no_sync(prepared):
        loss = prepared(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
        accelerator.backward(loss) if engine is None else prepared.backward(loss)
    left = storages(gradients_of(model, engine))
    if engine is not None and not last:
        prepared.step()  # counts the micro-step
    return left


def main():
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = [measure(case) for case in cases]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # the interpreter's own end aborts now and then (docs/decisions.md)


if __name__ == "__main__":
    main()
