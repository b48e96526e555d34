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

    keys: (documents,) uint64. Copies of one document have one key and so are on the same side: of all bounds the one with
    the number of documents below it nearest to round(fraction * documents), which without copies is that number. At
    least one document stands on each side; 0 where that cannot be (fraction 0, or all documents are the same).
    """
    distinct, copies = np.unique(keys, return_counts=True)
    below = np.cumsum(copies)[:-1]  # documents held out by the bound just above each key but the last
    if fraction == 0 or not len(below):
        return 0
    wanted = math.floor(fraction * len(keys) + 0.5)
    return int(distinct[np.abs(below - wanted).argmin()]) + 1
