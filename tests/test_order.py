"""The order of blocks: every block once an epoch, the same at every world size, and never another one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clm_dist.data.order import (
    AHEAD,
    blocks_at,
    ends_epoch,
    global_batch,
    micro_batches,
    permute,
    step_seed,
    steps_of_epochs,
)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_each_epoch_is_a_permutation(size, seed, epoch):
    epochs = np.full(size, epoch, dtype=np.uint64)
    order = permute(np.arange(size, dtype=np.uint64), size, seed, epochs)
    assert sorted(order.tolist()) == list(range(size))


@given(blocks=st.integers(8, 200), batch=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_every_block_once_an_epoch_whatever_the_batch(blocks, batch, seed):
    steps = steps_of_epochs(3, blocks, batch)
    stream = np.concatenate([global_batch(step, batch, blocks, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * blocks : (epoch + 1) * blocks].tolist()) == list(range(blocks))


@pytest.mark.parametrize("cursor", [0, 7, AHEAD - 3, AHEAD, 10**12 + 1])
@pytest.mark.parametrize("count", [0, 1, 8, 2 * AHEAD + 5])
def test_any_piece_of_the_stream_is_what_its_positions_say(cursor, count):
    """Whether stretches that are kept are crossed or not; and what is given out may be written to."""
    epochs, within = np.divmod(np.arange(cursor, cursor + count, dtype=np.uint64), np.uint64(300))
    expected = permute(within, 300, 5, epochs).astype(np.int64)
    found = blocks_at(cursor, count, 300, 5)
    assert found.dtype == np.int64 and np.array_equal(found, expected)
    found[:] = -1
    assert np.array_equal(blocks_at(cursor, count, 300, 5), expected)


def test_the_order_never_changes():
    """Written down once: a run started with an earlier version has to find its place again."""
    assert global_batch(0, 8, 10, seed=42).tolist() == [4, 9, 1, 2, 8, 0, 3, 7]
    assert global_batch(1, 8, 10, seed=42).tolist() == [6, 5, 7, 5, 2, 1, 3, 8]
    assert global_batch(10**9, 4, 10**6, seed=7).tolist() == [466146, 963194, 792051, 989785]


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        return permute(np.arange(500, dtype=np.uint64), 500, seed, np.full(500, epoch, dtype=np.uint64)).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(o) for o in orders}) == 4
    for a in range(4):
        for b in range(a):  # two independent orders agree in about one place of 500
            assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 10


def test_every_place_is_as_likely_as_another():
    """Chi-square over where block 0 and where pairs of neighbours go; 30 places, 6,000 orders."""
    size, trials = 30, 6000
    index = np.tile(np.arange(size, dtype=np.uint64), trials)
    epochs = np.repeat(np.arange(trials, dtype=np.uint64), size)
    orders = permute(index, size, 3, epochs).reshape(trials, size).astype(int)
    for counts, cells in (
        (np.bincount(orders[:, 0], minlength=size), size),
        (np.bincount(orders[:, 17], minlength=size), size),
        (np.bincount(np.diff(orders[:, :2]).ravel() % size, minlength=size)[1:], size - 1),
    ):
        expected = trials / cells
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 70, statistic  # p < 1e-4 at 29 degrees of freedom: 66


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_share_a_step_without_overlap(world_size, micro_batch_size):
    batch = global_batch(5, 24, 100, seed=1)
    shares = [micro_batches(batch, rank, world_size, micro_batch_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {24 // world_size // micro_batch_size}
    # micro-batch j of the step goes to rank j % world_size: taken in turn they are the batch itself
    in_turn = [micro for turn in zip(*shares, strict=True) for micro in turn]
    assert np.concatenate(in_turn).tolist() == batch.tolist()


def test_steps_of_epochs():
    assert steps_of_epochs(1, 100, 10) == 10
    assert steps_of_epochs(1, 101, 10) == 11  # the last step completes the pass
    assert steps_of_epochs(3, 484, 16) == 91  # 90.75
    assert steps_of_epochs(0.5, 100, 10) == 5
    assert steps_of_epochs(0.001, 100, 10) == 1


def test_epoch_ends():
    # 10 blocks, 4 a step: epochs are complete after blocks 10, 20, 30, that is within steps 3, 5, 8
    assert [step for step in range(1, 9) if ends_epoch(step, 10, 4)] == [3, 5, 8]


def test_dropout_seeds_are_distinct_and_fixed():
    seeds = {step_seed(seed, step, micro) for seed in range(4) for step in range(20) for micro in range(6)}
    assert len(seeds) == 4 * 20 * 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(42, 7, 3) == 4038492075152325935
