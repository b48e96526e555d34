"""What fits, what is recommended, what is sent, how long it takes: by hand."""

from dataclasses import replace

import pytest

from clm_dist.errors import ConfigError
from clm_dist.planning.communication import bytes_sent
from clm_dist.planning.estimate import cost_seconds, flops_per_token, seconds_per_step
from clm_dist.planning.memory import STRATEGIES, Activations, Envelope, Line
from clm_dist.planning.plan import command_for
from clm_dist.planning.planner import GIB, MOST, Cluster, Task, check_cluster, largest, recommend, rows
from clm_dist.planning.shapes import Shapes

DDP, ZERO1, ZERO2, ZERO3, FSDP2, *_ = STRATEGIES
SMALL = Shapes(matrices=(60, 36), vectors=(4,), frozen=(), buffer_bytes=0, lookup=20, layers=2, width=3)  # 100
# 2^30 parameters in 64 tensors
BILLION = Shapes(
    matrices=(GIB // 64,) * 64,
    vectors=(),
    frozen=(),
    buffer_bytes=0,
    lookup=0,
    layers=1,
    width=1,
    rows=(GIB // 64,) * 64,
)
NO_MEMORY = Activations(Line(0, 0), Envelope((Line(0, 0),)), counted=True)


def test_largest():
    assert [largest(lambda b, n=n: b <= n) for n in (0, 1, 5, MOST, MOST + 5)] == [0, 1, 5, MOST, MOST]


@pytest.mark.parametrize(
    ("strategy", "mixed", "micro_steps", "expected"),
    [
        (DDP, False, 1, 2 * 400 // 2),  # 100 fp32 gradients summed and given back, half of them over the wire of each
        (DDP, True, 8, 2 * 400 // 2),  # fp32 all the same, and once a step
        (ZERO1, False, 8, (2 * 400 + 400) // 2),  # and the updated parameters gathered
        (ZERO1, True, 8, (2 * 400 + 200) // 2),  # these in 16 bits, gradients in fp32
        (ZERO2, True, 1, (2 * 400 + 200) // 2),
        (ZERO2, True, 8, (8 * 2 * 400 + 200) // 2),  # gradients in every micro-step, parameters once
        (ZERO3, False, 1, 3 * 400 // 2),  # the paper's 3 psi
        (ZERO3, True, 1, (2 * 200 + 400) // 2),
        (ZERO3, True, 8, 8 * (2 * 200 + 400) // 2),
        (FSDP2, True, 8, (8 * 2 * 200 + 400) // 2),  # gradients once
    ],
)
def test_bytes_sent_by_one_of_two(strategy, mixed, micro_steps, expected):
    assert bytes_sent(SMALL, strategy, 2, mixed, micro_steps) == expected


def test_one_gpu_sends_nothing():
    assert bytes_sent(SMALL, ZERO3, 1, True, 4) == 0


def test_operations_of_a_token():
    # 80 parameters multiply, 6 operations each; 12 x 2 layers x 3 wide x 5 tokens of attention
    assert flops_per_token(SMALL, 5, False) == 6 * 80 + 12 * 2 * 3 * 5
    assert flops_per_token(SMALL, 5, True) == 8 * 80 + 16 * 2 * 3 * 5


def test_seconds():
    assert seconds_per_step(flops=6 * 10**9, tokens_per_step=1000, gpus=2, tflops=3) == 1.0


def task(memory_gib, global_batch_size=16, gpus=2, **more):
    return Task(BILLION, 8, global_batch_size, False, Cluster(gpus, memory_gib, **more))


def memory_of(kept_gib, checkpointed_gib):
    plain, less = (
        Activations(Line(0, each * GIB), Envelope((Line(0, each * GIB),)), counted=True)
        for each in (kept_gib, checkpointed_gib)
    )
    return {("fp32", False): plain, ("fp32", True): less}


def test_the_first_row():
    # 2^30 parameters: 4 + 4 + 8 GiB; 40 GiB leave (40 - 1) x 0.94 - 16 = 20.66: six of 3 GiB, of which 4 divide 8
    found = rows(task(40), memory_of(3, 1))
    best = found[0]
    assert (best.strategy, best.activation_checkpointing) == ("ddp", False)
    assert (best.micro_batch_size, best.largest_micro_batch_size) == (4, 6)
    assert (best.parameters, best.gradients, best.activations) == (4 * GIB, 4 * GIB, 12 * GIB)
    assert best.total == 28 * GIB + 4 * 64  # and Adam's count of updates, for each tensor


def test_the_cost_of_a_step_by_stated_speeds():
    # 4 micro-steps of 0.3 x 10^12 operations at 150 a second, and 30 of 10^9 bytes at 150
    assert cost_seconds(3 * 10**11, 10**6, 4, 30 * 10**9, nodes=1) == pytest.approx(4 * 0.002 + 0.2)
    assert cost_seconds(3 * 10**11, 10**6, 4, 30 * 10**9, nodes=2) == pytest.approx(4 * 0.002 + 2.4)
    assert cost_seconds(3 * 10**11, 10**6, 4, 0, nodes=1, tflops=300) == pytest.approx(4 * 0.001)
    # few tokens: 10^10 bytes of weights are read three times at 10^12 a second
    assert cost_seconds(3 * 10**11, 10**10, 4, 0, nodes=1) == pytest.approx(4 * 0.03)


def row(strategy, cost, fits=True, sums_in_16_bits=False):
    made = rows(task(40), memory_of(1, 1))[0]
    return replace(made, strategy=strategy, cost_seconds=cost, fits=fits, sums_in_16_bits=sums_in_16_bits)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([row("ddp", 1, fits=False), row("zero2", 3), row("zero3", 2), row("fsdp2", 4)], "zero3"),
        ([row("ddp", 2), row("zero3", 2)], "ddp"),  # the least sharing of equals
        ([row("zero1", 1, sums_in_16_bits=True), row("zero3", 2)], "zero3"),  # coarse sums are passed over
        ([row("zero1", 1), row("zero3", 2)], "zero1"),  # in one micro-step, or fp32, there are none
        ([row("zero1", 1, sums_in_16_bits=True), row("zero2_offload", 0.5)], "zero1"),  # but not for offload
        ([row("zero3", 9), row("zero2_offload", 1)], "zero3"),
        ([row("zero3", 9, fits=False), row("zero2_offload", 1)], "zero2_offload"),
        ([row("zero3", 9, fits=False)], None),
    ],
)
def test_the_least_cost_is_recommended(found, expected):
    best = recommend(found)
    assert (best.strategy if best else None) == expected


def test_stage_1_in_16_bits_adds_up_in_16_bits():
    given = replace(task(60), mixed=True)
    memory = {("bf16", False): NO_MEMORY, ("autocast", False): NO_MEMORY}
    assert not any(row.sums_in_16_bits for row in rows(given, memory))  # one micro-step
    short = {key: Activations(Line(0, 6 * GIB), Envelope((Line(0, 6 * GIB),)), True) for key in memory}
    assert [row.strategy for row in rows(given, short) if row.sums_in_16_bits] == ["zero1"]


def test_a_single_micro_step_leaves_no_gradients_waiting():
    """FSDP2's whole gradients, 4 GiB, are there only between micro-steps."""
    several, one = rows(task(23), memory_of(2, 1))[8], rows(task(23), memory_of(1, 1))[8]
    assert several.strategy == one.strategy == "fsdp2"
    # (23 - 1) x 0.94 = 20.68; 2 + 4 + 4 and 5 of 2 GiB, of which 4 divide 8
    assert (several.largest_micro_batch_size, several.micro_batch_size, several.gradients) == (5, 4, 4 * GIB)
    # 2 + 2 + 4 and 12 of 1 GiB
    assert (one.largest_micro_batch_size, one.micro_batch_size, one.gradients) == (12, 8, 2 * GIB)


def test_nothing_is_recommended_where_nothing_fits():
    assert recommend(rows(task(17), memory_of(30, 30))) is None


def test_checkpointing_where_nothing_fits_without():
    found = rows(task(40), memory_of(30, 1))
    best = recommend([row for row in found if not row.strategy.endswith("_offload")])
    assert (best.strategy, best.activation_checkpointing, best.micro_batch_size) == ("ddp", True, 8)


def test_offload_needs_the_cpus_memory():
    found = rows(task(16, cpu_memory_gib=1000.0), memory_of(1, 1))
    offloaded = next(row for row in found if row.strategy == "zero3_offload")
    assert offloaded.fits and offloaded.host_bytes_per_node == 2 * ((12 + 4 + 4) * GIB // 2 + 4)
    poor = rows(task(16, cpu_memory_gib=19.0), memory_of(1, 1))
    assert not any(row.fits for row in poor if row.strategy.endswith("_offload"))


def test_a_model_that_cannot_be_checkpointed_has_half_the_rows():
    assert len(rows(task(40), {("fp32", False): NO_MEMORY})) == len(STRATEGIES)


def test_time_is_known_where_a_speed_is():
    row = rows(task(40, tflops=100.0), memory_of(1, 1))[0]
    assert row.seconds_per_step == pytest.approx((6 * GIB + 12 * 8) * 16 * 8 / (2 * 100e12))
    assert rows(task(40), memory_of(1, 1))[0].seconds_per_step is None


@pytest.mark.parametrize(
    ("cluster", "needle"),
    [
        (Cluster(0, 80), "--gpus 0 is not possible; give a number above 0"),
        (Cluster(8, float("nan")), "--gpu-memory nan is not possible"),
        (Cluster(8, 80, nodes=3), "--gpus 8 cannot stand evenly in --nodes 3"),
        (Cluster(8, 80, cpu_memory_gib=-1), "--cpu-memory -1 is not possible"),
        (Cluster(8, 80, tflops=0), "--tflops 0 is not possible"),
        (Cluster(8, 0.5), "--gpu-memory 0.5 GiB is less than CUDA itself takes"),
        (
            Cluster(5, 80),
            "train.global_batch_size=16 is not divisible by 5 GPUs; set a multiple of 5, or plan for one of 1",
        ),
    ],
)
def test_a_cluster_that_cannot_be(cluster, needle):
    with pytest.raises(ConfigError, match="^.*" + needle.replace("(", r"\(")):
        check_cluster(cluster, 16)


def test_all_that_is_wrong_at_once():
    with pytest.raises(ConfigError) as caught:
        check_cluster(Cluster(-1, -1, nodes=0), 16)
    assert len(caught.value.problems) == 3


def test_the_command():
    row = next(row for row in rows(task(40), memory_of(30, 1)) if row.activation_checkpointing)
    given = ["run_dir=my runs/a", "train.micro_batch_size=3"]
    assert command_for(row, Cluster(2, 40), "r.yaml", given) == (
        "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m clm_dist train r.yaml "
        "'run_dir=my runs/a' train.micro_batch_size=8 train.activation_checkpointing=true"
    )
    nodes = command_for(row, Cluster(2, 40, nodes=2), "r.yaml", [])
    assert "--num_processes 2 --num_machines 2 --machine_rank $NODE_RANK --main_process_ip $MAIN_HOST" in nodes
