"""Several sources in one stream of documents, in exact proportions of their tokens.

No chance is involved: at each turn the source that is furthest behind its weight gives its next document, which keeps
the shares right at every moment, not only in the long run. This is stride scheduling (Waldspurger and Weihl, 1995).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from typing import Literal

import numpy as np

from clm_dist.preparation.packing import Documents

DOCUMENTS_PER_BATCH = 1000
TOKENS_PER_BATCH = 2**20  # a batch is closed by whichever comes first, so that long documents do not pile up

Stream = Callable[[], Iterator[Documents]]


@dataclass(frozen=True)
class Taken:
    """What a mixture took from one source."""

    documents: int  # repeated ones count again
    tokens: int
    passes: int  # complete readings; the one that was under way when the mixture ended does not count


def interleave(
    streams: Sequence[Stream], weights: Sequence[float], stop: Literal["first_exhausted", "all_exhausted"]
) -> Generator[Documents, None, list[Taken]]:
    """Documents of all sources; the source with the smallest tokens taken / weight has the turn, of equals the first.

    So tokens / weight of no source is ahead of another's by more than its longest document / weight. With p for a
    source's part of all weights, at every document its tokens are at most (1 - p) of its longest document above their
    share, and at most p times the others' longest documents together below it.

    `first_exhausted` ends when the turn is at a source that has no further document: nothing is repeated, and what is
    left of the others is not used. `all_exhausted` starts a source anew at its end, until each has been read whole.
    A source without documents ends both kinds when its turn comes (0 documents, 0 passes); the caller must check.

    Weights are positive and read as they are written (0.7 is 7/10), and all arithmetic is in integers: nothing drifts.
    """
    sources = [_Source(stream, pace) for stream, pace in zip(streams, _paces(weights), strict=True)]
    turns = [(0, index) for index in range(len(sources))]  # a heap of (clock, source)
    ids: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    documents = tokens = 0  # in these lists
    while turns:
        clock, index = heappop(turns)
        source = sources[index]
        if source.at_end and (stop == "first_exhausted" or not source.open()):
            break
        # Up to the next one's clock the turn stays here, so a run of documents is taken at once; ties are the heap's.
        run = source.take(-((clock - turns[0][0]) // source.pace) if turns else None)
        heappush(turns, (source.tokens * source.pace, index))
        ids.append(run[0])
        lengths.append(run[1])
        documents, tokens = documents + len(run[1]), tokens + len(run[0])
        if documents >= DOCUMENTS_PER_BATCH or tokens >= TOKENS_PER_BATCH:
            yield Documents(np.concatenate(ids), np.concatenate(lengths))
            ids, lengths, documents, tokens = [], [], 0, 0
        if stop == "all_exhausted" and source.at_end and all(one.passes for one in sources):
            break
    if ids:
        yield Documents(np.concatenate(ids), np.concatenate(lengths))
    return [Taken(source.documents, source.tokens, source.passes) for source in sources]


def _paces(weights: Sequence[float]) -> list[int]:
    """What a token of each source adds to its clock: 1 / weight, scaled to integers. [0.7, 0.2, 0.1] is [2, 7, 14]."""
    fractions = [Fraction(str(weight)) for weight in weights]
    if any(weight <= 0 for weight in fractions):
        raise ValueError(f"weights must be positive, not {list(weights)}")
    inverses = [1 / weight for weight in fractions]
    scale = math.lcm(*(inverse.denominator for inverse in inverses))
    divisor = math.gcd(*(int(inverse * scale) for inverse in inverses))
    return [int(inverse * scale) // divisor for inverse in inverses]


class _Source:
    """A source being read. It looks one batch ahead, so that `at_end` is known with the last document."""

    def __init__(self, stream: Stream, pace: int) -> None:
        self.stream = stream
        self.pace = pace
        self.documents = self.tokens = self.passes = 0
        self.document = self.token = 0  # where the next document begins in the batch
        self.open()

    def open(self) -> bool:
        """Starts from the beginning; False if there is nothing."""
        self.batches = self.stream()
        self.at_end = not self._read()
        return not self.at_end

    def take(self, tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths of the next documents: as many as `tokens` take, at least one, and only of this batch."""
        first, begin = self.document, self.token
        last = len(self.ends) - 1
        if tokens is not None:
            last = min(last, bisect_left(self.ends, begin + tokens, first))
        self.document, self.token = last + 1, self.ends[last]
        run = self.batch.ids[begin : self.token], self.batch.lengths[first : self.document]
        self.tokens += self.token - begin
        self.documents += self.document - first
        if self.document == len(self.ends) and not self._read():
            self.at_end = True
            self.passes += 1
        return run

    def _read(self) -> bool:
        """The next batch that holds anything; False at the end."""
        for batch in self.batches:
            if len(batch.ids):
                self.batch = batch
                self.ends: list[int] = np.cumsum(batch.lengths).tolist()
                self.document = self.token = 0
                return True
        return False
