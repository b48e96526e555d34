"""`data inspect`: what prepared data holds, for the eyes."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from clm_dist.data.blocks import DOCUMENTS, Blocks
from clm_dist.data.manifest import Manifest, read_manifest
from clm_dist.errors import UserError

BAR_WIDTH = 40


def inspect(folder: str, split: str, block: int | None) -> str:
    """The manifest and the lengths of documents, or the text of one block."""
    manifest = read_manifest(folder)
    if block is not None:
        return show_block(manifest, folder, split, block)
    lines = [f"{folder} (format {manifest.format}, key {manifest.key[:12]})"]
    lines += [f"  {name:<12} {value}" for name, value in _facts(manifest).items()]
    for name in manifest.splits:
        lines += ["", *_split(manifest, folder, name)]
    return "\n".join(lines)


def show_block(manifest: Manifest, folder: str, split: str, number: int) -> str:
    """The text of a block, a line of its own where a document starts."""
    from clm_dist.data.tokenize import load_tokenizer

    blocks = Blocks(Path(folder) / split)
    if not 0 <= number < len(blocks):
        range_ = f"blocks 0 to {len(blocks) - 1}" if len(blocks) else "no blocks"
        raise UserError(f"--block {number}: the {split} split of {folder} has {range_}")
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    ids, used = blocks[[number]][0], int(blocks.used([number])[0])
    starts = np.flatnonzero(blocks.document_starts([number])[0])
    bounds = sorted({0, used, *starts.tolist()})
    lines = [f"block {number} of {len(blocks)} ({split}): {used} tokens, {len(starts)} documents start in it"]
    for begin, end in pairwise(bounds):
        what = "document" if begin in starts else "continued"
        lines += [f"--- {what}, tokens {begin} to {end - 1}", tokenizer.decode(ids[begin:end].tolist())]
    if used < len(ids):
        lines.append(f"--- padding, {len(ids) - used} tokens")
    return "\n".join(lines)


def histogram(lengths: np.ndarray) -> list[str]:
    """Lengths in bins that double, a line each: '  64 -  127  #####  1,234'."""
    if not len(lengths):
        return []
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(bins)
    lines = []
    for power in range(int(bins.min()), len(counts)):
        width = int(np.ceil(BAR_WIDTH * counts[power] / counts.max()))
        bounds = f"{2**power:>9,} - {2 ** (power + 1) - 1:>9,}"
        lines.append(f"  {bounds}  {'#' * width:<{BAR_WIDTH}}  {counts[power]:,}")
    return lines


def _facts(manifest: Manifest) -> dict[str, str]:
    options = {name: value for name, value in manifest.options.items() if value is not None}
    return {
        "source": manifest.source,
        "tokenizer": f"{manifest.tokenizer}, {manifest.vocab_size:,} tokens, {manifest.dtype} on disk",
        "options": ", ".join(f"{name}={value!r}" for name, value in options.items()),
        "left out": str(manifest.left_out),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def _split(manifest: Manifest, folder: str, split: str) -> list[str]:
    c, size = manifest.splits[split], manifest.options["block_size"]
    lines = [
        f"{split}: {c.documents:,} documents, {c.bytes:,} bytes of text, {c.tokens:,} tokens "
        f"= {c.blocks:,} blocks x {size} - {c.padding:,} padding + {c.remainder}"
    ]
    for source, share in zip(manifest.source.split(" + "), c.shares, strict=False):
        part = share["tokens"] / max(1, c.tokens)
        lines.append(
            f"  {source} (weight {share['weight']:g}): {share['documents']:,} documents, {share['tokens']:,} tokens "
            f"({part:.2%}), {share['passes']} whole passes, {share['unused']:,} documents unused"
        )
    lines += ["  tokens of a document (as far as it stands in blocks):", *histogram(_lengths(folder, split))]
    return lines


def _lengths(folder: str, split: str) -> np.ndarray:
    """Tokens of each document, or piece of one that was cut; what the remainder holds is not in it."""
    blocks = Blocks(Path(folder) / split)
    starts = np.load(Path(folder) / split / DOCUMENTS, mmap_mode="r")
    ends = np.append(starts[1:], len(blocks) * blocks.block_size)
    lengths = ends - starts
    if blocks.num_padding and len(starts):
        last = (ends - 1) // blocks.block_size  # its last block
        is_last = np.append(last[1:] != last[:-1], True)
        padding = blocks.block_size - blocks.used(last[is_last])
        lengths[is_last] -= padding
    return np.asarray(lengths)
