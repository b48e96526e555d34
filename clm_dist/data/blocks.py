"""Blocks of token ids on disk: an Arrow stream per split that `datasets.load_from_disk` opens too.

T is block_size. One column, `input_ids`: fixed-size lists of T unsigned integers, so that the ids of a record batch lie
in one piece in the file and a memory map of it is an (n, T) array.
"""

import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

BLOCKS_PER_BATCH = 1024  # rows of every record batch but the last, so that block i stands in batch i // 1024
ARROW_FILE = "data-00000-of-00001.arrow"


def group(token_arrays: Iterable[np.ndarray], block_size: int) -> Generator[np.ndarray, None, np.ndarray]:
    """Cuts a stream of ids into blocks over the whole split: yields (n, T) arrays, returns the remainder (< T ids)."""
    rest: list[np.ndarray] = []
    held = 0
    for tokens in token_arrays:
        rest.append(tokens)
        held += len(tokens)
        if held >= block_size * BLOCKS_PER_BATCH:
            joined = np.concatenate(rest)
            whole = held // (block_size * BLOCKS_PER_BATCH) * block_size * BLOCKS_PER_BATCH
            yield joined[:whole].reshape(-1, block_size)
            rest, held = [joined[whole:]], held - whole
    joined = np.concatenate(rest) if rest else np.empty(0, dtype=np.uint16)
    whole = held // block_size * block_size
    if whole:
        yield joined[:whole].reshape(-1, block_size)
    return joined[whole:]


def write_blocks(folder: Path, blocks: Iterable[np.ndarray], block_size: int, dtype: np.dtype[Any], split: str) -> int:
    """Writes one split in the layout of `Dataset.save_to_disk`; returns the number of blocks."""
    from datasets import DatasetInfo, Features, List, Value

    folder.mkdir(parents=True)
    features = Features({"input_ids": List(Value(dtype.name), length=block_size)})
    count = 0
    with (folder / ARROW_FILE).open("wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as stream:
        for array in blocks:
            for start in range(0, len(array), BLOCKS_PER_BATCH):
                piece = np.ascontiguousarray(array[start : start + BLOCKS_PER_BATCH], dtype=dtype)
                column = pa.FixedSizeListArray.from_arrays(pa.array(piece.reshape(-1)), block_size)
                stream.write_batch(pa.record_batch([column], schema=features.arrow_schema))
                count += len(piece)
    DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": ARROW_FILE}],
        "_fingerprint": None,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    return count


class Blocks:
    """A split's blocks, memory-mapped: `blocks[[3, 17]]` is a (2, T) array."""

    def __init__(self, folder: Path) -> None:
        table = pa.ipc.open_stream(pa.memory_map(str(folder / ARROW_FILE))).read_all()
        self.block_size: int = table.schema.field("input_ids").type.list_size
        chunks = table.column("input_ids").chunks
        self._batches = [chunk.flatten().to_numpy().reshape(-1, self.block_size) for chunk in chunks]

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._batches)

    def __getitem__(self, indices: np.ndarray | list[int]) -> np.ndarray:
        rows = [self._batches[i // BLOCKS_PER_BATCH][i % BLOCKS_PER_BATCH] for i in np.asarray(indices).tolist()]
        return np.stack(rows)
