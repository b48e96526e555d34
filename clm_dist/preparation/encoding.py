"""Chunks to units: those of one shard that are not there yet, by several processes while this one reads on."""

from collections.abc import Iterator
from dataclasses import dataclass

from clm_dist.preparation.corpus import Corpus, Place
from clm_dist.preparation.pool import Pool, default_workers
from clm_dist.preparation.work import Shard, WorkFolder
from clm_dist.preparation.worker import Job, Task
from clm_dist.progress import bar

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
    sizes = [place.part.bytes for place in corpus.places()]
    small = all(sizes) and sum(sizes) < SMALL
    workers = 0 if small else workers or default_workers()
    known = [work.chunks_of(place.part, place.column, task.separator) for place in corpus.places()]
    total = None if None in known else sum(filter(None, known))
    with Pool(task, workers) as pool, bar("tokenising", "chunks", total) as shown:
        for done in pool.run(_missing(corpus, work, task, shard)):
            if done.bad is not None:
                raise done.bad.error()
            shown.update()
    return progress_of(corpus, work, task.separator)


def progress_of(corpus: Corpus, work: WorkFolder, separator: str) -> Progress:
    """What is there of all parts."""
    found = []
    for place in corpus.places():
        chunks = work.chunks_of(place.part, place.column, separator)
        done = work.done(place.part, place.column, separator)
        found.append(PartProgress(place.part.name, len(done), chunks))
    return Progress(found)


def _missing(corpus: Corpus, work: WorkFolder, task: Task, shard: Shard) -> Iterator[Job]:
    """The chunks of a shard without a unit. A part that is complete is not read."""
    places = corpus.places()
    for number, place in enumerate(places):
        yield from _missing_of_part(place, work, task, shard, number, len(places))


def _missing_of_part(
    place: Place, work: WorkFolder, task: Task, shard: Shard, number: int, parts: int
) -> Iterator[Job]:
    part, column = place.part, place.column
    chunks = work.chunks_of(part, column, task.separator)
    done = work.done(part, column, task.separator)
    if chunks is None:
        if parts >= 4 * shard.count and not shard.takes(number, parts, 0):
            return  # all of it is another's, who will note how many chunks it has
        first, last = 0, None
    else:
        wanted = [n for n in range(chunks) if n not in done and shard.takes(number, parts, n)]
        if not wanted:
            return
        first, last = wanted[0], wanted[-1]
    read = first
    for chunk in part.chunks(first):
        if read not in done and shard.takes(number, parts, read):
            yield Job(chunk, column, work.unit(part, column, task.separator, read))
        read += 1
        if last is not None and read > last:
            return
    work.note_chunks(part, column, task.separator, read)
