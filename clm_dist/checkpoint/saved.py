"""The tensors of a checkpoint by name and range, whoever wrote them: N ranks or M, whole ones or shards.

A whole tensor is stored under its name, elements from `start` on of a flattened one as `name@start`. Only what is asked for
is read, so that a rank which holds a shard needs no more memory than that.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from clm_dist.errors import RunError

SEPARATOR = "@"


@dataclass(frozen=True)
class Piece:
    """Elements of a flattened tensor that lie in one file."""

    start: int
    stop: int
    path: Path
    key: str
    shape: tuple[int, ...]  # as it is stored: of a whole tensor its own


class Saved:
    """Tensors in several files."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in paths}
        self._pieces: dict[str, list[Piece]] = {}
        for path, file in self._files.items():
            for key in file.keys():  # noqa: SIM118  # no dictionary
                name, _, start = key.partition(SEPARATOR)
                begin, shape = int(start or 0), tuple(file.get_slice(key).get_shape())
                self._pieces.setdefault(name, []).append(Piece(begin, begin + prod(shape), path, key, shape))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    def names(self) -> set[str]:
        """Of tensors of which at least a part is there."""
        return set(self._pieces)

    def numel(self, name: str) -> int:
        """Elements of the whole tensor."""
        return self._pieces[name][-1].stop

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of the flattened tensor, (stop - start,). RunError where some are missing."""
        parts, at = [], start
        for piece in self._pieces.get(name, []):
            if piece.start <= at < piece.stop and at < stop:
                end = min(stop, piece.stop)
                parts.append(self._of(piece, at - piece.start, end - piece.start))
                at = end
        if at != stop or not parts:
            raise RunError(f"{name}: the checkpoint holds no elements {at} to {stop}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A tensor of this shape; RunError where it was saved with another."""
        self.check_shape(name, shape)
        return self.read(name, 0, prod(shape)).view(shape)

    def check_shape(self, name: str, shape: torch.Size) -> None:
        """RunError where a tensor was saved with another shape, or its pieces have other elements together."""
        first = self._pieces[name][0]
        if first.key == name and first.shape != tuple(shape):
            raise RunError(f"{name} was saved as {first.shape}, the model has {tuple(shape)}")
        if self.numel(name) != prod(shape):
            raise RunError(f"{name} was saved with {self.numel(name)} elements, the model has {tuple(shape)}")

    def _of(self, piece: Piece, start: int, stop: int) -> torch.Tensor:
        """Elements of a stored tensor, of which only the rows that hold them are read."""
        file, shape = self._files[piece.path], piece.shape
        if start == 0 and stop == piece.stop - piece.start:
            tensor: torch.Tensor = file.get_tensor(piece.key)
            return tensor.reshape(-1)
        row = prod(shape[1:])
        first, last = start // row, -(-stop // row)
        rows: torch.Tensor = file.get_slice(piece.key)[first:last]
        return rows.reshape(-1)[start - first * row : stop - first * row]
