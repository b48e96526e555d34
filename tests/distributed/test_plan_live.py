"""What `plan` predicts for a model's state is what live engines hold, every rank, to the byte; and what they send.

Real processes train tiny models of five architectures, whose sizes neither 2 nor 3 divides, through our own engines: DDP,
DeepSpeed's three stages and FSDP2, in fp32 and bf16. They sum the storages of the tensors that are alive, and the bytes of
the collectives that they call (live_bytes.py).
"""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import BIN, ROOT, execute
from live_bytes import MICRO_STEPS, ROWS
from tiny_models import TINY, recipe_of, tiny_configuration

from clm_dist.config import ModelConfig
from clm_dist.planning.communication import bytes_sent
from clm_dist.planning.memory import STRATEGIES, ZeroSettings, model_state
from clm_dist.planning.shapes import shapes
from clm_dist.planning.zero_settings import zero_settings

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

LIVE = {strategy.name: strategy for strategy in STRATEGIES if not strategy.offload_optimizer}


def cases(architectures, precisions=("no", "bf16")):
    return [
        {"architecture": architecture, "strategy": strategy, "mixed_precision": precision}
        for architecture in architectures
        for strategy in LIVE
        for precision in precisions
    ]


@pytest.mark.slow
def test_two_architectures(tmp_path):
    """One in each precision; the soak suite has five in both."""
    first, second, *_ = TINY
    check(tmp_path, 2, cases([first], ["no"]) + cases([second], ["bf16"]))


@pytest.mark.soak
def test_five_architectures_in_both_precisions(tmp_path):
    check(tmp_path, 2, cases(TINY))


@pytest.mark.soak
def test_three_processes(tmp_path):
    check(tmp_path, 3, cases(["llama"]) + cases(["opt"], ["bf16"]))


def check(folder, world_size, wanted):
    """Predictions against measurements: while accumulating, at the update, after it, and on the wire."""
    measured = measure(folder, world_size, wanted)
    for rank in range(world_size):
        for case, live in zip(wanted, measured[rank], strict=True):
            which = f"rank {rank} of {world_size}, {case}"
            sent = live.pop("sent")
            state, most = predicted(case, world_size, rank)
            assert state == live, which
            if LIVE[case["strategy"]].stage < 3:
                # besides: padding, norms
                assert sent == pytest.approx(most, rel=0.01), which
            else:
                # small tensors, and what lies in no layer, are gathered once
                assert most / 2 < sent < 1.02 * most, which


def predicted(case, world_size, rank):
    """As `plan` does it: the bytes of a model's state, and those that are sent."""
    built = tiny_configuration(case["architecture"])
    found, strategy = shapes(ModelConfig(type=case["architecture"]), built), LIVE[case["strategy"]]
    config = recipe_of(case, world_size * ROWS * MICRO_STEPS)
    settings, note = zero_settings(config, world_size, built.hidden_size)
    assert note == ""
    mixed = case["mixed_precision"] != "no"
    between, at_update = (
        model_state(found, strategy, world_size, mixed, rank, accumulating, settings.get(strategy.name, ZeroSettings()))
        for accumulating in (True, False)
    )
    state = {
        "accumulating": between.gradients,
        "gradients": at_update.gradients,
        "parameters": at_update.parameters,
        "optimizer_states": at_update.optimizer_states,
    }
    return state, bytes_sent(found, strategy, world_size, mixed, MICRO_STEPS)


def measure(folder, world_size, wanted):
    """Launches live_bytes.py; a list of measurements for each rank."""
    (folder / "cases.json").write_text(json.dumps(wanted))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    # DeepSpeed looks for ninja there; behind the others, since another ninja would compile all anew
    environment["PATH"] = f"{os.environ['PATH']}:{BIN}"
    # no `accelerate launch`: it sets variables for one strategy, and here one launch has all of them in turn
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    program = Path(__file__).with_name("live_bytes.py")
    done = execute([*command, str(program), str(folder / "cases.json"), str(folder)], env=environment, timeout=900)
    assert done.code == 0, done.err[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
