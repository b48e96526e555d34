"""Chunks to units: those of one shard that are not there yet, by several processes while this one reads on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from clm_dist.preparation.corpus import Corpus, Place
from clm_dist.preparation.pool import Pool, default_workers
from clm_dist.preparation.work import Shard, WorkFolder
from clm_dist.preparation.worker import Job, Task
from clm_dist.progress import bar

LINE_EVERY = 60  # seconds between signs of life in a log that is no terminal
SMALL = 2**20  # bytes of source below which starting processes takes longer than the work


@dataclass(frozen=True)
class PartProgress:
    """How far a part is."""

    name: str
    done: int  # units that are there
    chunks: int | None  # of all; None while nobody has read the part to its end

    @property
    def missing(self) -> bool:
        """Whether there is work left."""
        return self.chunks is None or self.done < self.chunks


@dataclass(frozen=True)
class Progress:
    """How far all parts are."""

    parts: list[PartProgress]

    @property
    def missing(self) -> list[PartProgress]:
        """Parts with work left."""
        return [part for part in self.parts if part.missing]

    def __str__(self) -> str:
        done, missing = sum(part.done for part in self.parts), self.missing
        if not missing:
            return f"all {done} chunks of {len(self.parts)} files are done"
        of = sum(part.chunks or part.done for part in self.parts)
        about = " at least" if any(part.chunks is None for part in self.parts) else ""
        return f"{done} chunks of{about} {of} are done; {len(missing)} of {len(self.parts)} files are not complete"


def encode(corpus: Corpus, work: WorkFolder, task: Task, shard: Shard, workers: int | None) -> Progress:
    """Makes this shard's missing units; returns what is then there of all. UserError for the first bad record."""
    sizes = [place.part.bytes for place in corpus.places]
    small = None not in sizes and sum(filter(None, sizes)) < SMALL
    workers = 0 if small else workers or default_workers()
    before, total = _of_shard(corpus, work, shard)
    if before:
        print(f"going on: {before} {f'of {total} ' if total else ''}chunks are done")
    tokens, told = 0, time.monotonic()
    with Pool(task, workers) as pool, bar("tokenising", "chunks", total, before) as shown:
        for number, done in enumerate(pool.run(_missing(corpus, work, shard)), before + 1):
            if done.bad is not None:
                raise done.bad.error()
            tokens += done.tokens
            shown.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            shown.update()
            if shown.disable and time.monotonic() - told > LINE_EVERY:
                told = time.monotonic()
                print(f"tokenising: {number} {f'of {total} ' if total else ''}chunks, {tokens:,} tokens", flush=True)
    for place in corpus.places:
        place.part.check_unchanged()
    return progress_of(corpus, work)


def _of_shard(corpus: Corpus, work: WorkFolder, shard: Shard) -> tuple[int, int | None]:
    """How many chunks of a shard are done, and how many there are in all (None while only reading tells)."""
    done, parts, before, total = work.done(), len(corpus.places), 0, 0
    unknown = False
    for number, place in enumerate(corpus.places):
        before += sum(shard.takes(number, parts, chunk) for chunk in done[place.id])
        chunks = place.num_chunks(work)
        unknown |= chunks is None
        total += sum(shard.takes(number, parts, chunk) for chunk in range(chunks or 0))
    return before, None if unknown else total


def progress_of(corpus: Corpus, work: WorkFolder) -> Progress:
    """What is there of all parts."""
    done = work.done()
    parts = [PartProgress(place.part.name, len(done[place.id]), place.num_chunks(work)) for place in corpus.places]
    return Progress(parts)


def _missing(corpus: Corpus, work: WorkFolder, shard: Shard) -> Iterator[Job]:
    """The chunks of a shard without a unit. A part that is complete is not read."""
    done = work.done()
    parts = len(corpus.places)
    for number, place in enumerate(corpus.places):
        mine = partial(shard.takes, number, parts)
        if any(map(mine, range(shard.count))):  # else the whole part is another's, who will note its chunks
            yield from _missing_of_part(place, work, mine, done[place.id])


def _missing_of_part(place: Place, work: WorkFolder, mine: Callable[[int], bool], done: set[int]) -> Iterator[Job]:
    chunks = place.num_chunks(work)
    if chunks is None:
        first, last = 0, None
    else:
        wanted = [number for number in range(chunks) if number not in done and mine(number)]
        if not wanted:
            return
        first, last = wanted[0], wanted[-1]
    read = first
    for chunk in place.part.chunks(first):
        if read not in done and mine(read):
            yield Job(chunk, place.column, work.unit(place.id, read))
        read += 1
        if last is not None and read > last:
            return
    if place.part.num_chunks() is None:
        work.note_chunks(place.id, read)
