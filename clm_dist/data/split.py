"""Which documents are held out: by a hash of their contents, so that no order of files and no copy changes it. Pure."""

import hashlib
import math

import numpy as np


def document_key(text: str, seed: int) -> int:
    """A number in [0, 2**64) that depends on the text and the seed alone (BLAKE2b)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big")


def held_out_below(keys: np.ndarray, fraction: float) -> int:
    """The bound below which a document's key sends it to the evaluation split.

    keys: (documents,) uint64. Exactly round(fraction * documents) lie below it, and at least one where fraction > 0 and
    there are two or more; copies of one document have one key and so are on the same side.
    """
    if fraction == 0 or len(keys) == 0:
        return 0
    wanted = min(max(1, math.floor(fraction * len(keys) + 0.5)), len(keys) - 1)
    if wanted == 0:
        return 0
    return int(np.partition(keys, wanted - 1)[wanted - 1]) + 1
