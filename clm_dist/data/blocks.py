"""Blocks of token ids on disk: Arrow files per split that `datasets.load_from_disk` opens too.

T is block_size. One column, `input_ids`: fixed-size lists of T unsigned integers, so that the ids of a record batch lie
in one piece in the file and a memory map of it is an (n, T) array. Beside them lie `documents.npy`, where documents start
in all blocks one after another (ascending), and where blocks are padded `used.npy`, the tokens of each before that.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

BLOCKS_PER_BATCH = 1024  # rows of every record batch but the last of a file
BYTES_PER_FILE = 2**28  # of ids: small enough to copy again when one is damaged
DOCUMENTS = "documents.npy"
USED = "used.npy"


class BlockWriter:
    """Writes one split in the layout of `Dataset.save_to_disk`, block by block, in flat memory."""

    def __init__(self, folder: Path, block_size: int, dtype: np.dtype[Any], split: str) -> None:
        folder.mkdir()
        self.folder, self.block_size, self.dtype, self.split = folder, block_size, np.dtype(dtype), split
        self.blocks = 0
        self.padding = 0
        self.files: list[int] = []  # blocks of each file
        batch_bytes = BLOCKS_PER_BATCH * block_size * self.dtype.itemsize
        self._per_file = max(1, BYTES_PER_FILE // batch_bytes) * BLOCKS_PER_BATCH
        self._schema = pa.schema([("input_ids", pa.list_(pa.from_numpy_dtype(self.dtype), block_size))])
        self._stream: Any = None
        self._documents = _ArrayWriter(folder / DOCUMENTS)
        self._used: _ArrayWriter | None = None
        self._begin = 0  # blocks before the stream that is being written

    def write(self, blocks: np.ndarray, starts: np.ndarray, used: np.ndarray | None = None) -> None:
        """Blocks (n, T) in order; starts: where documents begin in the tokens of this stream so far and these.

        n is a multiple of BLOCKS_PER_BATCH, but for the last of a stream.
        """
        for at in range(0, len(blocks), BLOCKS_PER_BATCH):
            piece = np.ascontiguousarray(blocks[at : at + BLOCKS_PER_BATCH], dtype=self.dtype)
            if self._stream is None or self.files[-1] == self._per_file:
                self._next_file()
            # as `pa.array(piece)` has it, which would import pandas
            ids = pa.Array.from_buffers(pa.from_numpy_dtype(self.dtype), piece.size, [None, pa.py_buffer(piece)])
            column = pa.FixedSizeListArray.from_arrays(ids, self.block_size)
            self._stream.write_batch(pa.record_batch([column], schema=self._schema))
            self.files[-1] += len(piece)
            self.blocks += len(piece)
        whole = (self.blocks - self._begin) * self.block_size
        self._documents.write(starts[: np.searchsorted(starts, whole)] + self._begin * self.block_size)
        if used is not None:
            self._used = self._used or _ArrayWriter(self.folder / USED)
            self._used.write(used)
            self.padding += len(used) * self.block_size - int(used.sum())

    def end_stream(self) -> None:
        """What follows is counted anew, in a file of its own (an independent shard)."""
        self._begin = self.blocks
        self._close_file()

    def close(self) -> None:
        """Gives the files their names and writes what `datasets` wants to know."""
        if not self.files:
            self._next_file()  # a split without blocks opens too
        self._close_file()
        names = [f"data-{number:05d}-of-{len(self.files):05d}.arrow" for number in range(len(self.files))]
        for number, name in enumerate(names):
            self._partial(number).rename(self.folder / name)
        self._documents.close(self.blocks * self.block_size)
        if self._used is not None:
            self._used.close(self.block_size)
        value = {"dtype": self.dtype.name, "_type": "Value"}
        features = {"input_ids": {"feature": value, "length": self.block_size, "_type": "List"}}
        _write_json(self.folder / "dataset_info.json", {"citation": "", "description": "", "features": features})
        state: dict[str, Any] = dict.fromkeys(("_fingerprint", "_format_columns", "_format_type"))
        state |= {"_format_kwargs": {}, "_output_all_columns": False, "_split": self.split}
        state["_data_files"] = [{"filename": name} for name in names]
        _write_json(self.folder / "state.json", state)

    def blocks_by_file(self) -> dict[str, int]:
        """How many blocks each file holds."""
        return dict(zip(arrow_files(self.folder), self.files, strict=True))

    def _next_file(self) -> None:
        self._close_file()
        self._stream = pa.ipc.new_stream(str(self._partial(len(self.files))), self._schema)
        self.files.append(0)

    def _close_file(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _partial(self, number: int) -> Path:
        return self.folder / f"data-{number:05d}.partial"


class Blocks:
    """A split's blocks, memory-mapped: `blocks[[3, 17]]` is a (2, T) array."""

    def __init__(self, folder: Path) -> None:
        self._batches: list[np.ndarray] = []
        for name in arrow_files(folder):
            table = pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all()
            column = table.schema.field("input_ids").type
            self.block_size: int = column.list_size
            self.dtype = np.dtype(str(column.value_type))
            chunks = table.column("input_ids").chunks
            self._batches += [_ids(chunk, self.dtype).reshape(-1, self.block_size) for chunk in chunks]
        self._starts = [0, *accumulate(map(len, self._batches))]  # the number of each batch's first block
        self._documents = np.load(folder / DOCUMENTS, mmap_mode="r", allow_pickle=False)
        has_padding = (folder / USED).exists()
        self._used = np.load(folder / USED, mmap_mode="r", allow_pickle=False) if has_padding else None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = indices.tolist() if isinstance(indices, np.ndarray) else indices
        rows = np.empty((len(wanted), self.block_size), dtype=self.dtype)
        for row, index in enumerate(wanted):
            if not 0 <= index < self._starts[-1]:
                raise IndexError(f"block {index} of {len(self)}")
            batch = bisect_right(self._starts, index) - 1
            rows[row] = self._batches[batch][index - self._starts[batch]]
        return rows

    @property
    def num_padding(self) -> int:
        """Tokens that only fill up blocks."""
        return 0 if self._used is None else len(self) * self.block_size - int(self._used.sum(dtype=np.int64))

    def used(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64: the tokens of each block before its padding."""
        if self._used is None:
            return np.full(len(indices), self.block_size, dtype=np.int64)
        return np.asarray(self._used[np.asarray(indices, dtype=np.int64)], dtype=np.int64)

    def holds(self, token: int) -> bool:
        """Whether an id stands anywhere before the padding. Reads blocks until it is found: GB a second."""
        for start, rows in zip(self._starts, self._batches, strict=False):
            found = rows == token
            if self._used is not None and found.any():
                found &= np.arange(self.block_size) < self._used[start : start + len(rows), None]
            if found.any():
                return True
        return False

    def ids_present(self, size: int) -> np.ndarray:
        """(size,) bool: which ids below `size` stand anywhere before the padding. Reads all blocks, ten times as slowly."""
        present = np.zeros(size, dtype=bool)
        for start, rows in zip(self._starts, self._batches, strict=False):
            if self._used is None:
                present[rows] = True
            else:
                used = self._used[start : start + len(rows), None]
                present[rows[np.arange(self.block_size) < used]] = True
        return present

    def document_starts(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, T) bool: whether a document starts at a token. A block may begin in the midst of one."""
        marks = np.zeros((len(indices), self.block_size), dtype=bool)
        for row, index in enumerate(np.asarray(indices).tolist()):
            begin = index * self.block_size
            # of the array's own type: else all of it would be converted, at each look
            bounds = np.array((begin, begin + self.block_size - 1), dtype=self._documents.dtype)
            first = np.searchsorted(self._documents, bounds[0], "left")
            last = np.searchsorted(self._documents, bounds[1], "right")
            marks[row, self._documents[first:last].astype(np.int64) - begin] = True
        return marks

    def position_ids(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, T) int64: positions that restart with each document (and count on through the padding)."""
        here = np.arange(self.block_size)
        return here - np.maximum.accumulate(np.where(self.document_starts(indices), here, 0), axis=1)


def arrow_files(folder: Path) -> list[str]:
    """The names of a split's files of blocks, in order."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [file["filename"] for file in state["_data_files"]]


def _ids(chunk: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """The ids of a chunk of blocks where they lie, (n * T,). pyarrow's `to_numpy` is the same, but imports pandas."""
    flat = chunk.flatten()
    return np.frombuffer(flat.buffers()[1], dtype, len(flat), flat.offset * dtype.itemsize)


class _ArrayWriter:
    """A one-dimensional .npy file of ascending or small numbers, written piece by piece.

    Its header says how long it is and of which type (4 bytes a number where that is enough), and so is written last.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.length = path, 0
        self._partial = path.with_name(f"{path.name}.partial")
        self._file: BinaryIO = self._partial.open("wb")

    def write(self, values: np.ndarray) -> None:
        self._file.write(values.astype(np.int64).tobytes())
        self.length += len(values)

    def close(self, largest: int) -> None:
        """largest: what is looked for in it at most, so that its type holds that too."""
        self._file.close()
        dtype = np.dtype(np.uint32 if largest < 2**32 else np.int64)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (self.length,)}
        with self.path.open("wb") as file, self._partial.open("rb") as values:
            np.lib.format.write_array_header_1_0(file, header)
            while data := values.read(2**20):
                file.write(np.frombuffer(data, dtype=np.int64).astype(dtype).tobytes())
        self._partial.unlink()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
