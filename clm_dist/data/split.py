"""Which documents are held out: by a hash of their contents, so that no order of files and no copy changes it. Pure."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

BINS = 2**16  # of the range of keys: what stands in one is small enough to be held, however many documents there are


def document_key(text: bytes, seed: int) -> int:
    """A number in [0, 2**64) that depends on the (UTF-8) text and the seed alone (BLAKE2b)."""
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big")


def document_digest(text: bytes) -> int:
    """Another 64 bits, independent of the key: of two different texts both agree once in 10**38."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"document").digest(), "big")


def held_out_below(batches: Callable[[], Iterable[np.ndarray]], fraction: float) -> int:
    """The bound below which a document's key sends it to the evaluation split.

    batches: gives the keys of all documents, as arrays of uint64, each time it is called; they are gone through twice and
    never held together. Copies of one document have one key and so are on the same side: of all bounds the one with
    the number of documents below it nearest to round(fraction * documents), which without copies is that number. At
    least one document stands on each side; 0 where that cannot be (fraction 0, or all documents are the same).
    """
    if fraction == 0:
        return 0
    width = np.uint64(2**64 // BINS)
    counts = np.zeros(BINS, dtype=np.int64)
    for keys in batches():
        counts += np.bincount((keys // width).astype(np.int64), minlength=BINS)
    wanted = max(1, math.floor(fraction * counts.sum() + 0.5))
    ends = np.cumsum(counts)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return 0
    crossing = int(np.searchsorted(filled, np.searchsorted(ends, min(wanted, int(ends[-1])))))
    near = filled[max(0, crossing - 1) : crossing + 1]  # the bin in which `wanted` is reached, and the one before
    low, high = int(near[0]) * int(width), (int(near[-1]) + 1) * int(width)
    copies: Counter[int] = Counter()
    for keys in batches():
        chosen, number = np.unique(keys[(keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))], return_counts=True)
        copies.update(dict(zip(chosen.tolist(), number.tolist(), strict=True)))
    distinct = sorted(copies)
    below = int(ends[near[0]] - counts[near[0]]) + np.cumsum([copies[key] for key in distinct])
    if int(near[-1]) == int(filled[-1]):  # nothing would be left above the last key of all
        distinct, below = distinct[:-1], below[:-1]
    return distinct[int(np.abs(below - wanted).argmin())] + 1 if distinct else 0
