"""Tensors to .safetensors files and back: https://github.com/huggingface/safetensors (Format).

Written by us, since the library copies every tensor to Python bytes and cannot hash while it writes; read by the library.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clm_dist.checkpoint import disk

# torch's types by the format's names
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Writes tensors that lie in memory; returns the file's `sha256` and `bytes`."""
    return disk.write(path, _pieces(tensors))


def _pieces(tensors: dict[str, torch.Tensor]) -> Iterator[Any]:
    """Length of the header, header, and the tensors' bytes, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
