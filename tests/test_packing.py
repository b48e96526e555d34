"""Packing loses no token, says where each document starts, and best fit is exactly what its paper says."""

import tracemalloc
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clm_dist.preparation import packing as module
from clm_dist.preparation.packing import Documents, best_fit, concatenate

PAD = 9  # stands among the ids of a few tests, as the token of an end may


def documents(lengths, dtype=np.uint16):
    """Documents of these lengths, every token of them different: 0, 1, 2, ..."""
    return Documents(np.arange(sum(lengths)).astype(dtype), np.array(lengths, dtype=np.int64))


def batched(lengths, cuts=(), dtype=np.uint16):
    """The same in several batches, cut before these documents (twice the same: a batch without documents)."""
    whole = documents(lengths, dtype)
    bounds = [0, *sorted(cut % (len(lengths) + 1) for cut in cuts), len(lengths)]
    ends = np.concatenate([[0], np.cumsum(whole.lengths)]).astype(int)
    for first, last in pairwise(bounds):
        yield Documents(whole.ids[ends[first] : ends[last]], whole.lengths[first:last])


def collect(generator):
    """All that a generator yields, and what it returns."""
    packs = []
    while True:
        try:
            packs.append(next(generator))
        except StopIteration as end:
            return packs, end.value


def flat(packs):
    """Rows, starts and used of all yields, as lists."""
    rows, starts = ([one for pack in packs for one in getattr(pack, name).tolist()] for name in ("blocks", "starts"))
    return rows, starts, None if any(p.used is None for p in packs) else [n for p in packs for n in p.used.tolist()]


def starts_come_with_their_blocks(packs):
    """A yield has the starts that lie in its blocks, and one without blocks those that lie after all of them."""
    end = 0
    for pack in packs:
        begin, end = end, end + pack.blocks.size
        if not all(begin <= start and (start < end or begin == end) for start in pack.starts):
            return False
    return True


def pieces_of(lengths, block_size):
    """What best fit packs, written slowly: documents, cut where they are longer than a block; each a list of ids."""
    pieces, at = [], 0
    for length in lengths:
        for begin in range(0, length, block_size):
            pieces.append(list(range(at + begin, at + min(begin + block_size, length))))
        at += length
    return pieces


def read_back(rows, starts, used, block_size):
    """The pieces in blocks, found by starts and used alone."""
    pieces = []
    for start, following in pairwise([*starts, None]):
        row, column = divmod(start, block_size)
        same_row = following is not None and following // block_size == row
        pieces.append(rows[row][column : following % block_size if same_row else used[row]])
    return pieces


def slow_fit(lengths, block_size, window_blocks, choose):
    """Packing by its definition: every open block is looked at for every piece; `choose(rooms, size)` picks one."""
    windows = [[]]
    for piece in pieces_of(lengths, block_size):
        windows[-1].append(piece)
        if sum(map(len, windows[-1])) >= window_blocks * block_size:
            windows.append([])
    rows = []
    for window in windows:
        blocks = []
        for index in sorted(range(len(window)), key=lambda index: -len(window[index])):
            rooms = [block_size - sum(len(window[i]) for i in block) for block in blocks]
            block = choose(rooms, len(window[index]))
            if block is None:
                blocks.append([index])
            else:
                blocks[block].append(index)
        rows += [[window[index] for index in block] for block in sorted(sorted(block) for block in blocks)]
    return rows


def best(rooms, size):
    return min(((room, i) for i, room in enumerate(rooms) if room >= size), default=(0, None))[1]


def first(rooms, size):
    return next((i for i, room in enumerate(rooms) if room >= size), None)


def following(rooms, size):
    return len(rooms) - 1 if rooms and rooms[-1] >= size else None


def test_concatenate_by_hand():
    packs, remainder = collect(concatenate(batched([3, 1, 4], cuts=[1]), 3))
    assert (flat(packs), remainder) == (([[0, 1, 2], [3, 4, 5]], [0, 3, 4], None), 2)


def test_concatenate_keeps_starts_in_the_remainder():
    packs, remainder = collect(concatenate(batched([3, 2, 1]), 4))
    assert [(pack.blocks.tolist(), pack.starts.tolist()) for pack in packs] == [([[0, 1, 2, 3]], [0, 3]), ([], [5])]
    assert (packs[-1].blocks.shape, remainder) == ((0, 4), 2)
    packs, remainder = collect(concatenate(batched([2, 1]), 4))  # fills no block at all
    assert (flat(packs), remainder) == (([], [0, 2], None), 3)


cut_places = st.lists(st.integers(0, 60), max_size=9)


@given(st.lists(st.integers(1, 40), max_size=60), cut_places, st.integers(1, 9), st.integers(1, 4))
def test_concatenate_is_the_stream(lengths, cuts, block_size, per_batch):
    """Every token once and in order, every document with its start, in yields of so many blocks, however it came."""
    with mock.patch.object(module, "BLOCKS_PER_BATCH", per_batch):
        packs, remainder = collect(concatenate(batched(lengths, cuts), block_size))
    assert all(size == per_batch for size in [len(pack.blocks) for pack in packs if len(pack.blocks)][:-1])
    rows, starts, _ = flat(packs)
    total = sum(lengths)
    assert [token for row in rows for token in row] == list(range(total - remainder))
    assert remainder == total % block_size
    assert starts == [sum(lengths[:index]) for index in range(len(lengths))]
    assert starts_come_with_their_blocks(packs)


def test_1001_rows():
    """The guide's grouping (per 1,000 rows) raises here: the last batch holds less than a block."""
    packs, remainder = collect(concatenate(batched([3] * 1001, cuts=[1000]), 128))
    rows, starts, _ = flat(packs)
    assert (len(rows), remainder, len(starts)) == (23, 59, 1001)  # 3003 = 23 x 128 + 59
    _, starts, used = flat(collect(best_fit(batched([3] * 1001, cuts=[1000]), 128, PAD))[0])
    assert (used, len(starts)) == ([126] * 23 + [105], 1001)  # 42 documents a block, 35 in the last


def test_nothing():
    for batches in ([], [documents([])], [documents([])] * 3):
        assert collect(concatenate(batches, 4)) == ([], 0)
        assert collect(best_fit(batches, 4, PAD)) == ([], 0)


def test_best_fit_by_hand():
    """7 opens A, 6 B, 5 C, the other 5 fills C, 4 fills B, 3 fills A. Then by stream order: B, C, A."""
    packs, remainder = collect(best_fit([documents([6, 5, 4, 5, 3, 7])], 10, PAD))
    rows, starts, used = flat(packs)
    assert rows == [
        [0, 1, 2, 3, 4, 5, 11, 12, 13, 14],  # 6 and 4
        [6, 7, 8, 9, 10, 15, 16, 17, 18, 19],  # 5 and 5
        [20, 21, 22, 23, 24, 25, 26, 27, 28, 29],  # 3 and 7: in the stream's order, not by length
    ]
    assert (starts, used, remainder) == ([0, 6, 10, 15, 20, 23], [10, 10, 10], 0)


def test_padding_and_ties_by_hand():
    """Two blocks with room for 3: the older takes the 3, so the 2 goes to the younger and leaves one to pad."""
    rows, starts, used = flat(collect(best_fit([documents([7, 7, 3, 2])], 10, PAD))[0])
    assert rows == [[*range(7), 14, 15, 16], [*range(7, 14), 17, 18, PAD]]
    assert (starts, used) == ([0, 7, 10, 17], [10, 9])
    # 14 opens A, 10 and 10 open B and leave 3, then 6 leaves 3 in A: the older, though it came to 3 later, takes the 3.
    assert flat(collect(best_fit([documents([14, 10, 10, 6, 3])], 23, PAD))[0])[2] == [23, 20]


def test_documents_longer_than_a_block_by_hand():
    """Of T, T+1, 2T and 2T+1: full blocks, and the two tails of one token in one block."""
    packs, remainder = collect(best_fit([documents([4, 5, 8, 9])], 4, PAD))
    rows, starts, used = flat(packs)
    assert rows[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 25, PAD, PAD]]
    assert rows[3:] == [[9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20], [21, 22, 23, 24]]
    assert (starts, used, remainder) == ([0, 4, 8, 9, 12, 16, 20, 24], [4, 4, 2, 4, 4, 4, 4], 0)
    assert (packs[0].used.dtype, packs[0].starts.dtype, packs[0].blocks.dtype) == (np.uint32, np.int64, np.uint16)


def test_best_fit_is_not_first_fit():
    """9 leaves 4, 5 and 5 leave 3. The 3 must go to the fuller block; first fit gives it to the older and needs 3."""
    lengths = [9, 5, 5, 3, 2, 2]
    rows, _, used = flat(collect(best_fit([documents(lengths)], 13, PAD))[0])
    assert used == [13, 13]
    assert rows[1] == [*range(9, 19), 19, 20, 21]
    assert len(slow_fit(lengths, 13, 99, first)) == 3


lengths_and_sizes = st.tuples(
    st.lists(st.one_of(st.integers(1, 12), st.integers(1, 50)), max_size=50), st.integers(1, 16)
)


@settings(max_examples=300)
@given(lengths_and_sizes, cut_places, st.integers(1, 12), st.integers(1, 4))
def test_best_fit_is_its_definition(lengths_and_size, cuts, window_blocks, per_batch):
    """Equal to the slow reference, row by row, however the documents came."""
    lengths, block_size = lengths_and_size
    with mock.patch.object(module, "BLOCKS_PER_BATCH", per_batch):
        packs, remainder = collect(best_fit(batched(lengths, cuts), block_size, PAD, window_blocks))
    assert remainder == 0
    assert all(len(pack.blocks) % per_batch == 0 for pack in packs[:-1])
    assert starts_come_with_their_blocks(packs)
    rows, starts, used = flat(packs)
    expected = slow_fit(lengths, block_size, window_blocks, best)
    ids = [[token for piece in row for token in piece] for row in expected]
    assert rows == [row + [PAD] * (block_size - len(row)) for row in ids]
    assert (used or []) == [len(row) for row in ids]
    assert read_back(rows, starts, used, block_size) == [piece for row in expected for piece in row]


@given(lengths_and_sizes, st.integers(1, 12))
def test_no_document_is_split_or_lost(lengths_and_size, window_blocks):
    """Without the reference: the pieces in blocks are the documents, and the same where these are longer than T."""
    lengths, block_size = lengths_and_size
    rows, starts, used = flat(collect(best_fit([documents(lengths)], block_size, PAD, window_blocks))[0])
    found = read_back(rows, starts, used, block_size)
    assert sorted(found) == pieces_of(lengths, block_size)
    assert len(found) - len(lengths) == sum((length - 1) // block_size for length in lengths)
    assert all(row[n:] == [PAD] * (block_size - n) and n > 0 for row, n in zip(rows, used or [], strict=True))


def test_cutting_a_stream_splits_documents():
    """A mutant of the promise above: the same check fails on concatenation."""
    lengths = [3, 3, 3, 3]
    rows, starts, _ = flat(collect(concatenate(batched(lengths), 4))[0])
    assert sorted(read_back(rows, starts, [4] * len(rows), 4)) != pieces_of(lengths, 4)


def sample(count, seed=0):
    """Lengths as text has them: log-normal, mean 33."""
    return np.ceil(np.random.default_rng(seed).lognormal(3, 1, count)).astype(int).tolist()


def test_less_padding_than_simpler_ways():
    """Next fit, a mutant, takes much more; best fit takes the least there can be."""
    lengths = sample(1000)
    blocks = len(flat(collect(best_fit(batched(lengths), 128, PAD))[0])[0])
    assert blocks <= len(slow_fit(lengths, 128, 10**6, first))
    assert blocks == -(-sum(lengths) // 128)
    assert len(slow_fit(lengths, 128, 10**6, following)) > 1.04 * blocks


def test_what_a_window_costs():
    """Padding, of 1 M tokens in blocks of 128: nearly nothing seen whole, under 1 % in windows of 256 blocks."""
    lengths = sample(30_000)
    padding = {}
    for window in (16, 256, None):  # the default holds all of it
        packs, _ = collect(best_fit([documents(lengths, np.uint32)], 128, PAD, window))
        padding[window] = 1 - sum(lengths) / (128 * sum(len(pack.blocks) for pack in packs))
    assert padding[None] < 0.0005 < padding[256] < 0.01 < padding[16] < 0.1


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("pack", [concatenate, lambda batches, size: best_fit(batches, size, PAD, 300)])
def test_one_huge_document(pack, dtype):
    """Longer than several yields of 1,024 blocks, and nothing lost at their bounds."""
    length = 8 * 1024 * 3 + 11
    packs, remainder = collect(pack([documents([2, length, 1], dtype)], 8))
    rows, starts, used = flat(packs)
    assert {pack.blocks.dtype for pack in packs} == {np.dtype(dtype)}
    sizes = [len(pack.blocks) for pack in packs if len(pack.blocks)]
    assert len(sizes) > 2 and all(size % 1024 == 0 for size in sizes[:-1])
    if used is None:
        assert [token for row in rows for token in row] == list(range(length + 3 - remainder))
        assert (starts, remainder) == ([0, 2, length + 2], (length + 3) % 8)
    else:
        assert sorted(read_back(rows, starts, used, 8)) == pieces_of([2, length, 1], 8)
        assert len(rows) == 3074 + 1  # 3,073 full; the tail of 3 is in another window than the 2, and takes the 1


def test_an_id_is_never_wrapped():
    """Batches of another width are refused, and a pad that the ids' type does not hold."""
    with pytest.raises(TypeError):
        collect(concatenate([documents([1]), documents([5], np.uint32)], 3))
    with pytest.raises(OverflowError):
        collect(best_fit([documents([2])], 3, 70_000))


@pytest.mark.parametrize("pack", [concatenate, lambda batches, size: best_fit(batches, size, PAD, 256)])
def test_memory_is_flat(pack):
    """Twenty times the documents, the same memory."""

    def peak(count):
        tracemalloc.start()
        for _ in pack((documents(sample(200, seed=i)) for i in range(count)), 32):
            pass
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    assert peak(400) < 1.3 * peak(20)
