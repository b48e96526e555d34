"""What the model is given of blocks, and which of their tokens count.

Legend: B sequences, T = block_size.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clm_dist.data.blocks import Blocks
from clm_dist.ledger.ledger import DIGEST_MODULUS, digest_of


@dataclass(frozen=True)
class Batch:
    """Some blocks on the device."""

    input_ids: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor | None  # (B, T) int64, restarting with each document; None: the model's own
    scored: torch.Tensor | None  # (B, T - 1) bool, whether the token at t + 1 counts; None: all do

    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of the model.

        Restarting positions, no mask and no cache (`config.use_cache=False`) make transformers keep attention within each
        document (its `find_packed_sequence_indices`), however attention is computed; `check_isolation` proves it.
        """
        return {
            "input_ids": self.input_ids,
            **({} if self.position_ids is None else {"position_ids": self.position_ids}),
        }


class Batches:
    """Makes batches of blocks. isolate: documents do not see each other, nor is a document's first token predicted."""

    def __init__(self, blocks: Blocks, isolate: bool, device: torch.device) -> None:
        self.blocks, self.isolate, self.device = blocks, isolate, device
        self._all_count = not isolate and not blocks.num_padding
        self.digest, self.seconds = 0, 0.0  # of the blocks read since `begin`, and the time that took
        self._ahead: tuple[bytes, Batch] | None = None  # which blocks, made before they are asked for

    def begin(self) -> None:
        """What is read from here on is of another step."""
        self.digest, self.seconds = 0, 0.0

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The blocks of these numbers."""
        began = time.perf_counter()
        self.digest = (self.digest + digest_of(np.asarray(indices))) % DIGEST_MODULUS
        made, self._ahead = self._ahead, None
        batch = made[1] if made is not None and made[0] == _key(indices) else self._made(indices)
        self.seconds += time.perf_counter() - began
        return batch

    def prefetch(self, indices: Sequence[int] | np.ndarray) -> None:
        """Makes a batch that will be asked for, while a GPU has work: another one that is asked for instead is right too."""
        self._ahead = _key(indices), self._made(indices)

    def count(self, indices: Sequence[int] | np.ndarray) -> int:
        """How many tokens of these blocks are scored: known without reading their ids, and so by every rank of all."""
        if self._all_count:
            return len(indices) * (self.blocks.block_size - 1)
        return int(self._scored(indices).sum())

    def _made(self, indices: Sequence[int] | np.ndarray) -> Batch:
        positions = self.blocks.position_ids(indices) if self.isolate else None
        scored = None if self._all_count else self._scored(indices)
        return Batch(self._moved(self.blocks[indices].astype(np.int64)), self._moved(positions), self._moved(scored))

    def _scored(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        targets = np.arange(1, self.blocks.block_size)
        scored = targets < self.blocks.used(indices)[:, None]
        return scored & ~self.blocks.document_starts(indices)[:, 1:] if self.isolate else scored

    def _moved(self, array: np.ndarray | None) -> Any:
        return None if array is None else torch.from_numpy(array).to(self.device, non_blocking=True)


def _key(indices: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(indices, dtype=np.int64).tobytes()
