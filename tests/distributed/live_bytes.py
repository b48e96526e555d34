"""Run by test_plan_live.py on every rank: what one engine of ours after another really holds and sends.

    live_bytes.py CASES.json FOLDER

A case: {"architecture": name in tiny_models.TINY, "strategy": of planning/memory.py, "mixed_precision": "no" or "bf16"}.
Each is started as `train` starts it: settings resolved from ds_configs/, `start`, `make_engine`. Then one step of two
micro-steps. Each rank writes FOLDER/RANK.json: a list of {accumulating, gradients, parameters, optimizer_states, sent} in
bytes, in the order of the cases.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tiny_models import recipe_of, tiny_configuration
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from clm_dist.engine.make import make_engine
from clm_dist.model.loss import next_token_nll
from clm_dist.model.objective import Objective
from clm_dist.planning.deepspeed_config import resolve
from clm_dist.planning.deepspeed_launch import read
from clm_dist.planning.shapes import hidden_size
from clm_dist.training.optimizer import make_optimizer
from clm_dist.training.runtime import start
from clm_dist.training.sharding import Sharding, check_live

ROOT = Path(__file__).parents[2]
ROWS, TOKENS, MICRO_STEPS = 2, 8, 2
KINDS = {"ddp": "replicated", "fsdp2": "fsdp2"}  # of Sharding; the others are DeepSpeed's


class Wire(TorchDispatchMode):
    """Bytes that a ring of the ranks would send from each, for every collective under it that sums or gathers."""

    def __init__(self, world_size):
        super().__init__()
        self.world_size = world_size
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = sum(tensor.nbytes for tensor in tree_leaves(args) if torch.is_tensor(tensor))
            part = (self.world_size - 1) / self.world_size
            if func.__name__.startswith("allreduce_"):
                self.sent += 2 * given * part
            elif func.__name__.startswith(("_allgather_base_", "_reduce_scatter_base_")):  # a whole and a part
                self.sent += given * self.world_size / (self.world_size + 1) * part
            else:
                assert func.__name__.startswith(("broadcast_", "barrier")), func.__name__  # DeepSpeed's of few bytes
        return func(*args, **(kwargs or {}))


def storages(tensors):
    """Bytes of the storages behind these tensors, each counted once."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local is not None and local.untyped_storage().nbytes():
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def parameters_of(model):
    for parameter in model.parameters():
        yield parameter if isinstance(parameter, DTensor) else parameter.data
        yield getattr(parameter, "ds_tensor", None)  # this rank's part under stage 3


def gradients_of(model, zero):
    """Whatever of this step's gradient waits for the update: of parameters, and of DeepSpeed's and FSDP2's books."""
    for module in model.modules():
        state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        for one in state._fsdp_param_group.fsdp_params if state else ():
            yield one.unsharded_accumulated_grad
            yield one._unsharded_param.grad if hasattr(one, "_unsharded_param") else None
    for parameter in model.parameters():
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in (getattr(zero, name, None) or {}).values():
            yield from group or []
    yield getattr(zero, "grad_partitions_flat_buffer", None)


def states_of(optimizer, zero, model):
    """Moments and step counts, and the fp32 master copy where there is one."""
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters_of(model) if type(tensor) is torch.Tensor}
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for master in getattr(zero, name, []):
            if master.untyped_storage().data_ptr() not in own:
                yield master


def sharding_of(case, config, built):
    """What a launch with accelerate_configs/STRATEGY.yaml asks for."""
    strategy = case["strategy"]
    if strategy in KINDS:
        return Sharding(KINDS[strategy])
    path = f"ds_configs/{strategy}.json"
    return Sharding(
        "zero",
        resolve(
            read(str(ROOT / path)), path, config, world_size=int(os.environ["WORLD_SIZE"]), micro_batch_size=ROWS,
            gradient_accumulation_steps=MICRO_STEPS, hidden_size=hidden_size(built),
        ),
    )  # fmt: skip


def measure(case):
    """The bytes of one case on this rank: gradients before the update, parameters and states after it."""
    built = tiny_configuration(case["architecture"])
    config = recipe_of(case, int(os.environ["WORLD_SIZE"]) * ROWS * MICRO_STEPS)
    wanted = sharding_of(case, config, built)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = start(config.train.mixed_precision, wanted.settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(built).float()
    optimizer = make_optimizer(model, config.optim)
    engine = make_engine(wanted.kind, accelerator, model, optimizer, config.optim.max_grad_norm, Objective())
    check_live(wanted, engine, config)
    zero = getattr(engine, "zero", None)
    found = {}
    with Wire(accelerator.num_processes) as wire:
        for last in (False, True):
            with engine.micro_step(last):
                ids = torch.randint(0, 50, (ROWS, TOKENS))
                engine.backward(next_token_nll(engine.model(input_ids=ids, use_cache=False).logits, ids).mean())
            found["gradients" if last else "accumulating"] = storages(gradients_of(engine.plain, zero))
        engine.gradient_norm()
        engine.step(update=True)
    found["parameters"] = storages(parameters_of(engine.plain))
    found["optimizer_states"] = storages(states_of(engine.optimizer, zero, engine.plain))
    found["sent"] = wire.sent
    if zero is not None:
        engine.model.destroy()
    accelerator.free_memory()
    del engine, model, optimizer, zero
    gc.collect()
    return found


def main():
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = [measure(case) for case in cases]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # the interpreter's own end aborts now and then (docs/decisions.md)


if __name__ == "__main__":
    main()
