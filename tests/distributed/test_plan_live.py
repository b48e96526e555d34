"""What `plan` predicts for a model's state is what live engines hold: every rank, to the byte.

Real processes train tiny models of five architectures, whose sizes neither 2 nor 3 divides, with DDP and with DeepSpeed's
three stages, in fp32 and bf16, and sum the storages of the tensors that are alive (live_bytes.py).
"""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import BIN, ROOT, execute
from live_bytes import PERSISTENT
from tiny_models import TINY, tiny_configuration

from clm_dist.config import ModelConfig
from clm_dist.planning.memory import STRATEGIES, ZeroSettings, model_state
from clm_dist.planning.shapes import shapes

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
# DeepSpeed compiles a part of its own at first use, which is kept between runs
EXTENSIONS = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "clm-dist" / "extensions"))


def cases(architectures, strategies):
    return [
        {"architecture": architecture, "strategy": strategy, "mixed_precision": precision}
        for architecture in architectures
        for strategy in strategies
        for precision in ("no", "bf16")
    ]


def test_the_three_stages_of_one_model(tmp_path):
    check(tmp_path, 2, cases(["gpt2"], ["zero1", "zero2", "zero3"]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_five_architectures(tmp_path, strategy):
    check(tmp_path, 2, cases(TINY, [strategy]))


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [["ddp"], ["zero1", "zero2", "zero3"]], ids=["ddp", "zero"])
def test_three_processes(tmp_path, strategies):
    check(tmp_path, 3, cases(["llama", "opt"], strategies))


def check(folder, world_size, wanted):
    """Predictions against measurements: while accumulating, at the update, and after it."""
    settings = ZeroSettings(stage3_param_persistence_threshold=PERSISTENT)
    measured = measure(folder, world_size, wanted)
    for rank in range(world_size):
        for case, live in zip(wanted, measured[rank], strict=True):
            found = shapes(ModelConfig(type=case["architecture"]), tiny_configuration(case["architecture"]))
            between, at_update = (
                model_state(
                    found,
                    BY_NAME[case["strategy"]],
                    world_size,
                    mixed=case["mixed_precision"] != "no",
                    rank=rank,
                    accumulating=accumulating,
                    zero=settings,
                )
                for accumulating in (True, False)
            )
            predicted = {
                "accumulating": between.gradients,
                "gradients": at_update.gradients,
                "parameters": at_update.parameters,
                "optimizer_states": at_update.optimizer_states,
            }
            assert predicted == live, f"rank {rank} of {world_size}, {case}"


def measure(folder, world_size, wanted):
    """Launches live_bytes.py; a list of measurements for each rank."""
    (folder / "cases.json").write_text(json.dumps(wanted))
    deepspeed = wanted[0]["strategy"] != "ddp"
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    environment["PATH"] = f"{BIN}:{os.environ['PATH']}"  # DeepSpeed looks for ninja there
    if deepspeed:
        Path(EXTENSIONS).mkdir(parents=True, exist_ok=True)
        environment |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": EXTENSIONS}
        topology = folder / "deepspeed.yaml"
        topology.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
            "deepspeed_config: {zero3_init_flag: false}\n"
        )
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
        topology = ROOT / "accelerate_configs" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(topology)]
    command += ["--num_processes", str(world_size), "--main_process_port", "0"]
    program = Path(__file__).with_name("live_bytes.py")
    done = execute([*command, str(program), str(folder / "cases.json"), str(folder)], env=environment, timeout=900)
    assert done.code == 0, done.err[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
