"""Grouping loses nothing but the tail of a split, and what is on disk is what went in."""

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clm_dist.data import blocks as module
from clm_dist.data.blocks import Blocks, group, write_blocks


def grouped(lists, block_size):
    """All blocks as one list of rows, and the remainder."""
    arrays, rest = [], None

    def run():
        nonlocal rest
        rest = yield from group((np.array(one, dtype=np.uint16) for one in lists), block_size)

    for array in run():
        arrays += array.tolist()
    return arrays, rest.tolist()


@given(st.lists(st.lists(st.integers(0, 60_000), max_size=40), max_size=40), st.integers(2, 9))
def test_conservation(lists, block_size):
    """Every token once and in order, over the whole split, whatever the lists were."""
    rows, rest = grouped(lists, block_size)
    assert all(len(row) == block_size for row in rows)
    assert len(rest) < block_size
    assert [token for row in rows for token in row] + rest == [token for one in lists for token in one]


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(2, 5), st.integers(1, 4))
def test_conservation_across_record_batches(lengths, block_size, batch):
    before, module.BLOCKS_PER_BATCH = module.BLOCKS_PER_BATCH, batch
    try:
        lists = [list(range(length)) for length in lengths]
        rows, rest = grouped(lists, block_size)
        assert [token for row in rows for token in row] + rest == [token for one in lists for token in one]
    finally:
        module.BLOCKS_PER_BATCH = before


def test_1001_rows():
    """The guide's grouping (per 1,000 rows) raises here: the last batch holds less than a block."""
    rows, rest = grouped([[1, 2, 3]] * 1001, 128)
    assert (len(rows), len(rest)) == (23, 59)  # 3003 = 23 x 128 + 59


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [0, 1, 1024, 2500])
def test_written_blocks_read_back_and_open_in_datasets(tmp_path, dtype, count):
    rows = (np.arange(count * 8) % 50_000).astype(dtype).reshape(count, 8)
    assert write_blocks(tmp_path / "train", [rows], 8, np.dtype(dtype), "train") == count
    blocks = Blocks(tmp_path / "train")
    assert len(blocks) == count and blocks.block_size == 8
    if count:
        pick = [0, count - 1, count // 2]
        assert blocks[pick].tolist() == rows[pick].tolist()
        assert blocks[pick].dtype == dtype
    opened = datasets.load_from_disk(str(tmp_path / "train"))
    assert opened.num_rows == count
    assert opened["input_ids"][:] == rows.tolist()


def test_blocks_are_mapped_not_loaded(tmp_path):
    rows = np.zeros((3000, 64), dtype=np.uint16)
    write_blocks(tmp_path / "train", [rows], 64, rows.dtype, "train")
    blocks = Blocks(tmp_path / "train")
    assert all(not batch.flags.owndata for batch in blocks._batches)


def test_the_same_blocks_are_the_same_bytes(tmp_path):
    rows = np.arange(4096, dtype=np.uint16).reshape(-1, 16)
    for name in ("a", "b"):
        write_blocks(tmp_path / name, [rows], 16, rows.dtype, "train")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
