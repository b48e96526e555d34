"""Which block is in which step: a pure function of (seed, epoch, step), the same at every world size.

The blocks of all epochs form one endless stream: epoch 0 in its random order, then epoch 1 in another, and so on. Step
s takes positions s * G to (s + 1) * G - 1 (G: global_batch_size), so a step may straddle two epochs and no block is
ever dropped or repeated within an epoch. The only state is the integer `step`; any step is found at once, without a walk
through those before it, and no permutation is ever held in memory.

Each epoch's order is a keyed permutation of the block numbers: a Feistel network (Luby & Rackoff, 1988) over the next
even power of two, walked until it lands inside (cycle-walking; Black & Rogaway, CT-RSA 2002). Integer arithmetic only:
no library's random generator has to stay the same for a run to be resumed.
"""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np

AHEAD = 4096  # positions of the stream that are permuted together: numpy takes about four times as long as for eight
ROUNDS = 8  # 4 suffice for large sets by Luby-Rackoff; more cost little and mix sets of a few blocks well


def global_batch(step: int, global_batch_size: int, num_blocks: int, seed: int) -> np.ndarray:
    """The blocks of one step over all processes, in order: (G,) int64."""
    return blocks_at(step * global_batch_size, global_batch_size, num_blocks, seed)


def blocks_at(cursor: int, count: int, num_blocks: int, seed: int) -> np.ndarray:
    """The next `count` blocks of the endless stream from position `cursor` on: (count,) int64."""
    first, end = cursor // AHEAD, max(cursor + 1, cursor + count)
    stretches = [_stretch(number, num_blocks, seed) for number in range(first, -(-end // AHEAD))]
    return np.concatenate(stretches)[cursor - first * AHEAD :][:count]


@lru_cache(maxsize=4)
def _stretch(number: int, num_blocks: int, seed: int) -> np.ndarray:
    """The blocks of AHEAD positions of the stream: (AHEAD,) int64, shared, not to be written to."""
    positions = np.arange(number * AHEAD, (number + 1) * AHEAD, dtype=np.uint64)
    epochs, within = positions // np.uint64(num_blocks), positions % np.uint64(num_blocks)
    return permute(within, num_blocks, seed, epochs).astype(np.int64)


def micro_batches(batch: np.ndarray, rank: int, world_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """This rank's share of a global batch: its micro-batches in order, each (B,).

    Micro-batch j of the step (rows j * B to (j + 1) * B - 1) goes to rank j % world_size.
    """
    pieces = batch.reshape(-1, micro_batch_size)
    return list(pieces[rank::world_size])


def permute(index: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where a random permutation of range(size) sends `index`; there is one permutation per (seed, epoch).

    index, epochs: (n,) uint64. Returns (n,) uint64.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [mix(mix(np.uint64(seed) + epochs * np.uint64(2**32)) + np.uint64(r)) for r in range(ROUNDS)]
    result = index.astype(np.uint64)
    todo = np.ones(len(result), dtype=bool)
    while todo.any():  # the domain is less than four times `size`, so a few walks do
        left, right = result[todo] >> half, result[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix(right + key[todo]) & mask)
        result[todo] = (left << half) | right
        todo = result >= size
    return result


def step_seed(seed: int, step: int, micro_step: int) -> int:
    """Seed of dropout for one micro-batch of the global batch: no generator state has to be kept or restored."""
    with np.errstate(over="ignore"):
        mixed = mix(mix(mix(np.uint64(seed)) + np.uint64(step)) + np.uint64(micro_step))
    return int(mixed >> np.uint64(1))  # torch takes 63 bits


def steps_of_epochs(epochs: float, num_blocks: int, global_batch_size: int) -> int:
    """Steps until every block was seen `epochs` times: the last step is the one that completes the last pass."""
    blocks = Fraction(str(epochs)) * num_blocks  # exact: 2.2 * 25 is 55.000000000000007 in floating point
    return max(1, math.ceil(blocks / global_batch_size))


def ends_epoch(step: int, num_blocks: int, global_batch_size: int) -> bool:
    """Whether an epoch is complete after `step` steps and was not before the last of them."""
    return step * global_batch_size // num_blocks > (step - 1) * global_batch_size // num_blocks


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): a good mix of 64 bits, modulo 2**64."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
