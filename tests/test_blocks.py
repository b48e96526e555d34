"""What is on disk is what went in, for us and for `datasets`, and where documents start is known."""

import datasets
import numpy as np
import pytest
from conftest import write_blocks

from clm_dist.data import blocks as module
from clm_dist.data.blocks import Blocks, BlockWriter


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("count", [0, 1, 1024, 2500])
def test_written_blocks_read_back_and_open_in_datasets(tmp_path, dtype, count):
    rows = (np.arange(count * 8) % 50_000).astype(dtype).reshape(count, 8)
    write_blocks(tmp_path / "train", rows)
    blocks = Blocks(tmp_path / "train")
    assert len(blocks) == count and blocks.block_size == 8
    if count:
        pick = [0, count - 1, count // 2]
        assert blocks[pick].tolist() == rows[pick].tolist()
        assert blocks[np.array(pick)].dtype == dtype
    for outside in (-1, count):
        with pytest.raises(IndexError, match=f"block {outside} of {count}"):
            blocks[[outside]]
    opened = datasets.load_from_disk(str(tmp_path / "train"))
    assert opened.num_rows == count
    assert opened["input_ids"][:] == rows.tolist()


def test_many_files_are_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES_PER_FILE", 2 * 1024 * 4 * 2)  # two record batches of T=4, two bytes an id
    rows = np.arange(5000 * 4, dtype=np.uint16).reshape(-1, 4)
    writer = BlockWriter(tmp_path / "train", 4, rows.dtype, "train")
    writer.write(rows[:4096], np.array([0, 7]))
    writer.write(rows[4096:], np.array([4096 * 4 + 1]))
    writer.close()
    names = [f"data-0000{n}-of-00003.arrow" for n in range(3)]
    assert writer.blocks_by_file() == dict(zip(names, [2048, 2048, 904], strict=True))
    assert {path.name for path in (tmp_path / "train").glob("*.arrow")} == set(names)
    blocks = Blocks(tmp_path / "train")
    every = np.arange(5000)
    assert (blocks[every] == rows).all()
    assert datasets.load_from_disk(str(tmp_path / "train"))["input_ids"][:] == rows.tolist()


def test_streams_are_counted_on(tmp_path):
    """Independent shards: each begins anew in a file of its own; what starts in a remainder is in no block."""
    rows = np.arange(12, dtype=np.uint16).reshape(-1, 4)
    writer = BlockWriter(tmp_path / "train", 4, rows.dtype, "train")
    writer.write(rows[:2], np.array([0, 5, 8]))  # 8 lies in the remainder of the first stream
    writer.end_stream()
    writer.write(rows[2:], np.array([0, 3]))
    writer.close()
    blocks = Blocks(tmp_path / "train")
    assert writer.files == [2, 1]
    assert (blocks[[0, 1, 2]] == rows).all()
    assert blocks.document_starts([0, 1, 2]).astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]]


def test_documents_and_positions(tmp_path):
    rows = np.zeros((3, 4), dtype=np.uint16)
    writer = BlockWriter(tmp_path / "train", 4, rows.dtype, "train")
    writer.write(rows, np.array([0, 3, 9, 10]), np.array([4, 2, 3], dtype=np.uint32))
    writer.close()
    blocks = Blocks(tmp_path / "train")
    assert blocks.document_starts([2, 0]).astype(int).tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert blocks.position_ids([0, 1, 2]).tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 1]]
    assert blocks.used([2, 1]).tolist() == [3, 2]
    assert (blocks.num_padding, writer.padding) == (3, 3)


def test_documents_beyond_four_billion_tokens(tmp_path):
    """The file of starts has four bytes a number while that is enough; looking into it converts nothing."""
    array = module._ArrayWriter(tmp_path / "a.npy")
    array.write(np.array([1, 2**32 - 1]))
    array.close(2**32 - 1)
    assert np.load(tmp_path / "a.npy").dtype == np.uint32
    array = module._ArrayWriter(tmp_path / "b.npy")
    array.write(np.array([1, 2]))
    array.close(2**32)  # what is looked for may be more than what is there
    assert np.load(tmp_path / "b.npy").dtype == np.int64


def test_blocks_are_mapped_not_loaded(tmp_path):
    write_blocks(tmp_path / "train", np.zeros((3000, 64), dtype=np.uint16))
    assert all(not batch.flags.owndata for batch in Blocks(tmp_path / "train")._batches)


def test_the_same_blocks_are_the_same_bytes(tmp_path):
    rows = np.arange(4096, dtype=np.uint16).reshape(-1, 16)
    for name in ("a", "b"):
        write_blocks(tmp_path / name, rows)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
