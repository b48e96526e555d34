"""Scaling on paper: the formulas and the simulation by hand, and the page's tables as the script computes them."""

import json
import sys
from itertools import product

import pytest
from conftest import ROOT

from clm_dist.planning.communication import bytes_sent
from clm_dist.planning.memory import STRATEGIES
from clm_dist.planning.shapes import Shapes

sys.path.append(str(ROOT / "benchmarks"))  # behind tests/, which has a launched.py too

import scaling
import scaling_check
from scaling_model import (
    Anatomy,
    Compute,
    Fabric,
    Link,
    Message,
    Tensor,
    Unit,
    all_reduce,
    ddp_buckets,
    last_arrival,
    one_pass,
    ring_pass,
    sharded_micro_step,
    split,
    step_seconds,
    tree_all_reduce,
    units_of,
    zero_buckets,
)

DDP, ZERO1, ZERO2, ZERO3, FSDP2, *_ = STRATEGIES
# an embedding of 40 that is the head too, two layers of 25 and 1, a norm of 8
TIED = Anatomy(
    (Tensor(40, 0, -1), Tensor(25, 25, 0), Tensor(1, 1, 0), Tensor(25, 25, 1), Tensor(1, 1, 1), Tensor(8, 8, -1)),
    head=40,
    hidden=2,
)
SLOW = Link(bandwidth=10.0, latency=0.5)
NODES = Fabric(node=Link(100.0, 0.1), network=SLOW, gpus_per_node=4, launch=0.2)
WORK = Compute(forward=1.0, backward=2.0, update=0.4)


def test_a_pass_of_a_ring():
    # three times a quarter of 80 bytes at 10 bytes/s, and three hops
    assert ring_pass(80, 4, SLOW) == pytest.approx(6 + 1.5)
    assert ring_pass(80, 1, SLOW) == 0


def test_two_trees():
    # 80 bytes up and down, three levels for eight ranks each way
    assert tree_all_reduce(80, 8, SLOW) == pytest.approx(16 + 3)


def test_within_a_node():
    assert one_pass(80, 4, NODES) == pytest.approx(0.2 + 0.6 + 0.3)
    assert all_reduce(80, 4, NODES) == pytest.approx(0.2 + 1.2 + 0.6)
    assert all_reduce(80, 2, NODES) == pytest.approx(0.2 + 2 * 40 / 100 + 2 * 0.1)


def test_between_nodes_each_gpu_has_its_ring():
    # a fourth of 80 bytes: half of it in a pass between two nodes
    assert one_pass(80, 8, NODES) == pytest.approx(1.1 + 1 + 0.5)
    assert all_reduce(80, 8, NODES) == pytest.approx(2.0 + 2 * (1 + 0.5))


def test_a_tree_where_a_ring_is_too_long():
    # 8 bytes, 2 for each GPU of a node, over 16 nodes: a ring has 30 hops, two trees 8
    ring, trees = 2 * (15 / 16 * 0.2 + 15 * 0.5), 2 * 0.2 + 8 * 0.5
    assert trees < ring
    assert all_reduce(8, 64, NODES) == pytest.approx(0.2 + 2 * (0.06 + 0.3) + trees)


def test_one_gpu_sends_nothing_and_half_a_node_is_none():
    assert all_reduce(80, 1, NODES) == one_pass(80, 1, NODES) == one_pass(0, 8, NODES) == 0
    with pytest.raises(ValueError, match="6 GPUs do not fill nodes of 4"):
        all_reduce(80, 6, NODES)


def test_a_measured_step_in_its_parts():
    # 40 bytes for each of 10 parameters at 1,000 bytes/s; a third and two thirds of what is left
    assert split(3.4, 10, 1000, checkpointing=False) == Compute(pytest.approx(1), pytest.approx(2), 0.4)
    assert split(4.4, 10, 1000, checkpointing=True) == Compute(pytest.approx(1), pytest.approx(3), 0.4)
    assert split(6.4, 10, 1000, checkpointing=False, micro_steps=2).forward == pytest.approx(1)


def test_buckets_of_ddp():
    # backwards: 8 and 1 are 36 bytes and full; 25 and 1 are 104; 25 and 40 are 260, ready at the very end
    done = [(40 + 8 + 1) / 100, (40 + 8 + 1 + 25 + 1) / 100, 1.0]
    sizes = [36, 104, 260]
    assert ddp_buckets(TIED, first=36, cap=104) == [
        Message(s, pytest.approx(r)) for s, r in zip(sizes, done, strict=True)
    ]
    assert ddp_buckets(TIED) == [Message(400, 1.0)]


def test_buckets_of_deepspeed():
    # of at most 26 elements: (8, 1), (25, 1), 25, 40
    assert [message.size for message in zero_buckets(TIED, 26)] == [36, 104, 100, 160]
    assert [message.ready for message in zero_buckets(TIED, 26)] == pytest.approx([0.49, 0.75, 1, 1])


def test_messages_queue_and_computing_hides_them():
    messages = [Message(30, 0.25), Message(10, 0.5), Message(20, 1.0)]
    # at 10 bytes/s in 8 s: from 2 to 5, from 5 to 6, from 8 to 10
    assert last_arrival(messages, 8.0, lambda size: size / 10, overlap=True) == 10
    # at 4 bytes/s: from 2 to 9.5, to 12, to 17
    assert last_arrival(messages, 8.0, lambda size: size / 4, overlap=True) == 17
    assert last_arrival(messages, 8.0, lambda size: size / 10, overlap=False) == 14
    assert last_arrival(messages[:2], 8.0, lambda size: size / 10, overlap=True) == 8


def test_what_is_gathered_as_one():
    by_layer = [(80, 160, 0), (52, 104, 0.26), (52, 104, 0.26), (16, 32, 0.08), (0, 0, 0.4)]
    assert units_of(TIED, FSDP2, width=2) == [Unit(w, g, pytest.approx(work)) for w, g, work in by_layer]
    # more than 10 x 2 elements: the embedding, and the two of 25 with the small ones before them
    by_tensor = [(80, 160, 0), (50, 100, 0.25), (52, 104, 0.26), (18, 36, 0.09), (0, 0, 0.4)]
    assert units_of(TIED, ZERO3, width=2) == [Unit(w, g, pytest.approx(work)) for w, g, work in by_tensor]


def test_a_sharded_micro_step():
    units, compute = [Unit(10, 20, 0.5), Unit(10, 20, 0.5)], Compute(8.0, 8.0, 0.0)

    def passed(size):
        return size / 10

    # forward: gathered 0 to 1, computed 1 to 5 while the second comes, computed 5 to 9, gathered again 5 to 6; backward:
    # 9 to 13 and 13 to 17; scattered 13 to 15 and 17 to 19
    assert sharded_micro_step(units, compute, passed, exchange=True, overlap=True) == 19
    assert sharded_micro_step(units, compute, passed, exchange=False, overlap=True) == 17
    assert sharded_micro_step(units, compute, passed, exchange=True, overlap=False) == 16 + 4 + 4
    # a link ten times slower: gathers end at 10, 20, and 30, then computed to 34; the second gather 30 to 40, scatters 40
    # to 60 and, after the last computing 40 to 44, 60 to 80
    assert sharded_micro_step(units, compute, lambda size: size, exchange=True, overlap=True) == 80


def test_a_step_of_every_engine_without_overlap():
    fabric = Fabric(Link(100.0, 0.0), SLOW, gpus_per_node=2)
    small = 64 / 100  # an all-reduce of n bytes between two sends n
    # 400 bytes of gradients, 200 of weights in 16 bits; sharded: half of the update, two small sums
    expected = {
        (DDP, 1): 3 + 4 + small + 0.4,
        (DDP, 3): 9 + 4 + small + 0.4,
        (ZERO1, 3): 9 + 4 + 2 * small + 0.2 + 1,
        (ZERO2, 3): 9 + 12 + 2 * small + 0.2 + 1,
        (ZERO3, 3): 3 * (3 + 2 + 2) + 2 * small + 0.2,
        (FSDP2, 3): 9 + 6 + 2 + 2 * small + 0.2,
    }
    for (strategy, micro_steps), seconds in expected.items():
        found = step_seconds(TIED, strategy, 2, WORK, fabric, micro_steps, overlap=False)
        assert found == pytest.approx(seconds), strategy.name


def test_large_buckets_are_sent_while_stage_1_computes():
    # a link so fast that only what is ready last is not hidden: 260 bytes of 400, of buckets of 35 elements
    fabric = Fabric(Link(1000.0, 0.0), SLOW, gpus_per_node=2)
    waits = step_seconds(TIED, ZERO1, 2, WORK, fabric)
    goes_on = step_seconds(TIED, ZERO1, 2, WORK, fabric, bucket=35)
    assert waits - goes_on == pytest.approx((400 - 260) / 1000)


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("strategy", [DDP, ZERO1, ZERO2, ZERO3, FSDP2], ids=lambda one: one.name)
def test_as_many_bytes_as_the_plan_counts(strategy, micro_steps):
    """At a byte a second and no latency a step without computing lasts as many seconds as the plan says bytes are sent."""
    shapes = Shapes(matrices=(40, 25, 25), vectors=(1, 1, 8), frozen=(), buffer_bytes=0, lookup=0, layers=2, width=2)
    fabric = Fabric(Link(1.0, 0.0), SLOW, gpus_per_node=4)
    seconds = step_seconds(TIED, strategy, 4, Compute(0, 0, 0), fabric, micro_steps, overlap=False)
    small = 64 * 2 * 3 / 4 * (1 if strategy is DDP else 2)
    assert seconds - small == pytest.approx(bytes_sent(shapes, strategy, 4, True, micro_steps))


def case(engine="ddp"):
    return scaling.Case("tied", TIED, engine, WORK, sequences=4, block=10, own=True)


def test_weak_scaling():
    point = scaling.weak(case(), 2, Fabric(Link(100.0, 0.0), SLOW, gpus_per_node=2))
    seconds = 1 + 2 + 4 + 0.64 + 0.4  # one bucket, ready at the end of the backward pass
    assert point == scaling.Point(pytest.approx(seconds), pytest.approx(80 / seconds), pytest.approx(3.4 / seconds))


def test_what_to_change():
    fabric = Fabric(Link(100.0, 0.0), SLOW, gpus_per_node=2)
    more = scaling.weak(case(), 2, fabric, times=4)
    assert more.seconds == pytest.approx(4 * 3 + 4 + 0.64 + 0.4)
    assert more.tokens_per_second == pytest.approx(320 / more.seconds)
    assert scaling.weak(case(), 2, fabric, faster=3).seconds == pytest.approx(1 + 4 + 0.64 + 0.4)
    twice = scaling.weak(case(), 2, fabric, micro_steps=2)
    assert twice == scaling.Point(pytest.approx(11.04), pytest.approx(160 / 11.04), pytest.approx(6.4 / 11.04))


def test_strong_scaling():
    fabric = Fabric(Link(100.0, 0.0), SLOW, gpus_per_node=2)
    # 16 sequences on two GPUs: two micro-steps of four each; one GPU needs four
    seconds = 3 + 3 + 4 + 0.64 + 0.4
    point = scaling.strong(case(), 2, fabric, 160)
    assert point == scaling.Point(
        pytest.approx(seconds), pytest.approx(160 / seconds), pytest.approx(12.4 / 2 / seconds)
    )
    # 4 sequences on two GPUs: micro-batches of half the size
    assert scaling.strong(case(), 2, fabric, 40).seconds == pytest.approx(1.5 + 4 + 0.64 + 0.4)
    assert scaling.strong(case(), 2, fabric, 10) is None


def test_where_it_stops():
    efficiency = {1: 1.0, 2: 0.9, 4: 0.8, 8: 0.79, 16: 0.95}

    def point(gpus):
        return scaling.Point(1.0, 1.0, efficiency[gpus]) if gpus in efficiency else None

    assert scaling.reach(point, 0.8) == 4
    assert scaling.reach(point, 0.5) == 16  # 32 GPUs would have less than a sequence each
    assert scaling.reach(lambda gpus: scaling.Point(1.0, 1.0, 1.0), 0.8) == 1024


def test_the_line_through_measured_collectives():
    # 0.5 s a hop, 10 bytes/s: an all-reduce of three has four hops and sends four thirds
    points = [(size, 2 + 4 / 3 * size / 10) for size in (3.0, 30.0, 300.0)]
    assert scaling_check.fitted(points, 3, 2) == pytest.approx((10, 0.5))
    points = [(size, 0.5 + size / 2 / 10) for size in (4.0, 8.0, 400.0)]
    assert scaling_check.fitted(points, 2, 1) == pytest.approx((10, 0.5))


def test_the_models_of_the_page_have_their_real_sizes():
    parameters = {one.model: one.anatomy.parameters for one in scaling.cases(inputs())}
    expected = {"DistilGPT2": 81_912_576, "GPT-2": 124_439_808, "GPT-2 medium": 354_823_168}
    assert expected.items() <= parameters.items()
    tied = {one.model: one.anatomy.head for one in scaling.cases(inputs())}
    assert tied["GPT-2"] == 50257 * 768 and tied["LLaMA 1B"] == 0


def test_the_speeds_are_those_of_the_results():
    text = (ROOT / inputs()["measured_in"]).read_text()
    for row in inputs()["measured"]:
        engines = ("ddp", "plain") if row["engine"] == "ddp" else (row["engine"],)
        begins = (f"| {row['model']} | {engine} | {row['checkpointing']} | True |" for engine in engines)
        rows = [line for line, begin in product(text.splitlines(), begins) if line.startswith(begin)]
        assert any(f"| {row['tokens_per_second']:,} |" in line for line in rows), row


def test_the_page_shows_what_the_script_computes():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.between_markers(page, scaling.tables(inputs())) == page


def inputs():
    return json.loads(scaling.INPUTS.read_text())
