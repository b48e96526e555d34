"""A prepared data set, opened and checked to be what a recipe asks for."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from clm_dist.config import Config
from clm_dist.data import tokenize
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import Manifest, check_fits, read_manifest, source_name
from clm_dist.data.source import Source, open_sources
from clm_dist.errors import UserError

STAGED = "CLM_DIST_STAGED_DATA"  # a copy on the local disk of this node, which blocks are read from


def open_prepared(config: Config) -> Manifest:
    """The manifest of the recipe's prepared data, checked to be what the recipe asks for.

    Source and tokenizer are read only where they are called otherwise than at `prepare`: compute nodes may have neither.
    """
    manifest = read_manifest(config.data.prepared_dir)
    identity, sha256 = manifest.source_identity, manifest.tokenizer_sha256
    if manifest.source != source_name(config):
        identity = identity_of(open_sources(config.data))
    if manifest.tokenizer != tokenize.tokenizer_name(config):
        sha256 = wanted_tokenizer(config, manifest, None)
    check_fits(manifest, config, identity, sha256)
    check_whole(manifest, Path(config.data.prepared_dir))
    return manifest


def check_whole(manifest: Manifest, folder: Path) -> None:
    """UserError where a file is missing or of another size; `data verify` reads them, too."""
    for name, written in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != written["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes, {written['bytes']:,} were written"
            raise UserError(f"{folder / name} {what}; copy it again, or remove {folder} and prepare again")


def open_blocks(config: Config, manifest: Manifest, split: str) -> Blocks:
    """The blocks of a split, as many as the manifest counts: a copy cut short may well be readable."""
    root, expected = Path(os.environ.get(STAGED) or config.data.prepared_dir), manifest.splits[split].blocks
    if STAGED in os.environ and read_manifest(str(root)).files != manifest.files:
        raise UserError(f"{STAGED}={root} is a copy of other data than {config.data.prepared_dir}; unset it")
    folder = root / split
    remedy = f"copy it again, or remove {folder.parent} and prepare again"
    try:
        blocks = Blocks(folder)
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"{folder} is damaged ({error}); {remedy}") from None
    if len(blocks) != expected:
        raise UserError(f"{folder} holds {len(blocks)} blocks, its manifest says {expected}; {remedy}")
    return blocks


def identity_of(sources: list[Source]) -> Any:
    """What the contents of the sources are: that of the only one, or a list."""
    identities = [source.identity() for source in sources]
    return identities[0] if len(identities) == 1 else identities


def wanted_tokenizer(config: Config, manifest: Manifest, tokenizer: Any) -> str:
    """The hash of the tokenizer that the recipe asks for."""
    if config.data.tokenizer_vocab_size is None:
        return tokenize.tokenizer_sha256(tokenizer or tokenize.load_tokenizer_of(config))
    if manifest.tokenizer == tokenize.tokenizer_name(config):
        return manifest.tokenizer_sha256  # trained on the same documents by the same rule: the same
    return "unknown before training a " + tokenize.tokenizer_name(config)
