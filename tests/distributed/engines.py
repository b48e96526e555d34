"""Run by test_zero_step.py and test_zero_export.py on every rank: an engine as `train` makes it, taken through one case.

    engines.py withheld|export RECIPE FOLDER [KEY=VALUE ...]

`withheld` prints nothing and fails where a step that is withheld leaves a trace. `export` writes FOLDER/model, what each
rank holds, the logits of the live model, and FOLDER/RANK.json: bytes that gathering the weights took, by idiom.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

import clm_dist.training.train as training
from clm_dist import recipe
from clm_dist.checkpoint import tensors
from clm_dist.checkpoint.saved import Saved
from clm_dist.model.objective import find_objective
from clm_dist.publish.export import export

sys.path.insert(0, str(Path(__file__).parent))
import mutants

KIND, RECIPE, FOLDER, *OVERRIDES = sys.argv[1:]
RANK = os.environ["RANK"]


def main():
    """The beginning of `train`, and then one of the cases."""
    config = recipe.load(RECIPE, OVERRIDES)
    job = training.open_job(config, overwrite=False)
    accelerator = training.start(config.train.mixed_precision, job.sharding.settings)
    model = training.build_model(config.model, job.model_configuration, config.seed)
    objective = find_objective(model)
    optimizer = training.make_optimizer(model, config.optim)
    engine = training.make_engine(
        job.sharding.kind, accelerator, model, optimizer, config.optim.max_grad_norm, objective
    )
    training.check_live(job.sharding, engine, config)
    engine.set_lr(1e-2)
    {"withheld": withheld, "export": exported}[KIND](engine, job)
    training.finish(accelerator)


def gradients(engine, job, seed, factor=1.0):
    """Those of a step of two micro-steps on tokens of this rank's own; returns their norm."""
    engine.model.train()
    for micro_step in (0, 1):
        drawn = torch.Generator().manual_seed(100 * seed + 10 * micro_step + int(RANK))
        ids = torch.randint(job.manifest.vocab_size, (2, 16), generator=drawn)
        with engine.micro_step(last=micro_step == 1):
            loss = engine.objective.summed(engine.model, {"input_ids": ids}) / ids[:, 1:].numel()
            engine.backward(loss * factor)
    return engine.gradient_norm()


def everything(engine):
    """Copies of all there is: masters and moments of this rank, the weights that the model computes with."""
    held = {f"{kind}/{name}": one.clone() for kind, held in engine.held().items() for name, one in held.items()}
    full = {f"live/{name}": one.clone() for name, one in engine.full_weights() if one is not None}
    return {**held, **full, **{f"replica/{name}": one.detach().clone() for name, one in engine.replicas().items()}}


def same(one, other):
    """Whether all bits are equal."""
    return one.keys() == other.keys() and all(
        one[name].view(-1).view(torch.uint8).equal(other[name].view(-1).view(torch.uint8)) for name in other
    )


def withheld(engine, job):
    """Finite and NaN gradients of rank 1 are withheld: no bit changes, and the next step is that of a run without them."""
    assert torch.isfinite(gradients(engine, job, 0))
    engine.step(update=True)
    before = everything(engine)
    assert any(name.startswith("optimizer/exp_avg_sq.") for name in before)
    saved = write(engine)
    for factor in (1000.0, float("nan") if RANK == "1" else 1.0):
        norm = gradients(engine, job, 1, factor)
        assert torch.isfinite(norm) == (factor == 1000.0) or RANK == "0", norm
        engine.step(update=False)
        assert same(everything(engine), before)
    norm = gradients(engine, job, 2)
    engine.step(update=True)
    after = everything(engine)
    assert not same(after, before)
    engine.load(*saved)
    assert same(everything(engine), before)
    assert gradients(engine, job, 2).equal(norm)
    engine.step(update=True)
    assert same(everything(engine), after)
    # and the usual trick, a learning rate of 0, is seen: moments and counts have moved
    engine.load(*saved)
    engine.set_lr(0.0)
    gradients(engine, job, 1)
    engine.step(update=True)
    assert not same(everything(engine), before)


def write(engine):
    """What all ranks hold, as files; opened."""
    for kind, held in engine.held().items():
        tensors.save(Path(FOLDER, f"{kind}-{RANK}.safetensors"), held)
    engine.accelerator.wait_for_everyone()
    return [Saved(sorted(Path(FOLDER).glob(f"{kind}-*.safetensors"))) for kind in ("model", "optimizer")]


def exported(engine, job):
    """After one step: the export, and what it cost."""
    gradients(engine, job, 0)
    engine.step(update=True)
    write(engine)
    main = engine.accelerator.is_main_process
    engine.model.eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = engine.model(input_ids=ids).logits
    list(engine.full_weights())  # a forward pass leaves a small model gathered; whoever frees it first would look cheap
    figures = {
        "largest": max(one.ds_numel * one.element_size() for one in engine.plain.parameters()),
        "whole": sum(one.ds_numel * one.element_size() for one in engine.plain.parameters()),
        "shard": sum(one.ds_tensor.numel() * one.element_size() for one in engine.plain.parameters()),
        "sharded": sum(one.numel() == 0 for one in engine.plain.parameters()),
    }

    def ours():
        folder = Path(FOLDER, "model")
        sampling = recipe.load(RECIPE, OVERRIDES).generate
        export(engine.plain, engine.full_weights(), job.tokenizer, folder, {}, sampling, main)

    figures["ours"] = least(ours)
    for name in ("get_state_dict", "gathered_at_once"):
        original = type(engine).full_weights
        mutants.apply(name)
        figures[name] = least(lambda: [one for one in engine.full_weights() if one[1] is not None])
        type(engine).full_weights = original
    Path(FOLDER, f"{RANK}.json").write_text(json.dumps(figures))
    if main:
        torch.save(logits, Path(FOLDER, "logits.pt"))
    broadcast_object_list([None])


def least(function):
    """The smallest peak of three: what gloo's threads free late comes on top, and the busier a machine is the later."""
    return min(peak(function) for _ in range(3))


def peak(function):
    """Bytes that torch's allocator had given out at most while a function ran, above those of before: counted, by it.

    Its own total is read at each event of this thread: gloo's threads free, too, which nobody else would hear of.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    totals = []
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == "[memory]":
            totals.append((node.start_time_ns, node.extra_fields.total_allocated, node.extra_fields.alloc_size))
    first = min(totals)
    return max(total for _, total, _ in totals) - (first[1] - first[2])


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the real entry point does under a launcher
