"""`data verify`: prepared data read again from its first byte to its last."""

import hashlib
from pathlib import Path

import pyarrow as pa

from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import MANIFEST, Manifest, key_of, read_manifest
from clm_dist.errors import UserError
from clm_dist.progress import progress


def verify(folder: str) -> str:
    """Says what was found right; UserError that names the first file that is not what was written."""
    manifest, root = read_manifest(folder), Path(folder)
    remedy = f"copy it again from where it is whole, or remove {folder} and prepare again"
    if manifest.key != key_of(manifest.source_identity, manifest.tokenizer_sha256, manifest.options):
        raise UserError(f"{root / MANIFEST} was changed: its key is not that of what it says; {remedy}")
    for name, expected in progress(manifest.files.items(), "verifying", "files"):
        problem = _problem(root / name, expected["sha256"], expected["bytes"])
        if problem:
            raise UserError(f"{root / name} {problem}; {remedy}")
    for split in manifest.splits:
        problem = _miscount(root / split, split, manifest)
        if problem:
            raise UserError(f"{root / split}: {problem}; {remedy}")
    strangers = sorted(
        name
        for path in root.rglob("*")
        if path.is_file() and (name := path.relative_to(root).as_posix()) not in (MANIFEST, *manifest.files)
    )
    tokens = sum(counts.tokens for counts in manifest.splits.values())
    size = sum(file["bytes"] for file in manifest.files.values())
    sums = f"{len(manifest.files)} files, {size:,} bytes, {tokens:,} tokens"
    found = f"{folder}: {sums}: all as written (key {manifest.key[:12]})"
    return found + (f"\nnot part of it: {', '.join(strangers[:5])}" if strangers else "")


def _problem(path: Path, sha256: str, size: int) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size:,} bytes, {size:,} were written"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if found == sha256 else f"is damaged: its SHA-256 is {found[:12]}, {sha256[:12]} was written"


def _miscount(folder: Path, split: str, manifest: Manifest) -> str | None:
    """Whether tokens in == blocks x block_size + remainder, from what is there."""
    counts = manifest.splits[split]
    try:
        blocks = Blocks(folder)
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        return f"cannot be opened ({error})"
    out = len(blocks) * manifest.options["block_size"] + counts.remainder - blocks.num_padding
    return None if out == counts.tokens else f"holds {out:,} tokens, {counts.tokens:,} went in"
