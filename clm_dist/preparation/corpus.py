"""All that a recipe's sources hold, part by part: what there is to encode, and what has been."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from clm_dist.config import DataConfig
from clm_dist.data.records import Bad, texts_of
from clm_dist.data.source import Part, Source
from clm_dist.errors import UserError
from clm_dist.preparation.selection import Stretch
from clm_dist.preparation.units import UnitFile
from clm_dist.preparation.work import WorkFolder

FILES_CHECKED = 64
CHUNKS_SAMPLED = 16


@dataclass(frozen=True)
class Place:
    """A part, and where it belongs."""

    source: int
    split: str  # as the source calls it
    column: str
    part: Part
    id: str  # of its contents and how they are read: the name of its units

    def num_chunks(self, work: WorkFolder) -> int | None:
        """How many chunks it has: told by itself, or noted when it was read to its end; else None."""
        number = self.part.num_chunks()
        return work.noted_chunks(self.id) if number is None else number


class Corpus:
    """The sources of a recipe, in order."""

    def __init__(self, config: DataConfig, sources: Sequence[Source]) -> None:
        self.config = config
        self.sources = list(sources)

    @cached_property
    def places(self) -> list[Place]:
        """Every part of every split that is used."""
        splits = [split for split in (self.config.train_split, self.config.eval_split) if split is not None]
        return [
            Place(number, split, str(entry.text_column), part, self._id(part, str(entry.text_column)))
            for number, (entry, source) in enumerate(zip(self.config.entries(), self.sources, strict=True))
            for split in splits
            for part in source.parts(split)
        ]

    def _id(self, part: Part, column: str) -> str:
        parts = json.dumps([part.key, column, self.config.text_separator])
        return hashlib.sha256(parts.encode()).hexdigest()[:24]

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split of all sources, those without text left out; bad records as data.on_error says."""
        for place in self.places:
            for chunk in place.part.chunks() if place.split == split else ():
                for text in texts_of(chunk, place.column, self.config.text_separator):
                    if isinstance(text, Bad):
                        if self.config.on_error == "stop":
                            raise text.error()
                    elif text and not text.isspace():
                        yield text

    def check_first_records(self) -> None:
        """UserError where the first record of a file is bad: a wrong column shows now, and not when its turn comes.

        Of the first files only: a folder may have a hundred thousand, and a stream has to be asked for.
        """
        for place in [place for place in self.places if place.part.bytes is not None][:FILES_CHECKED]:
            chunk = next(place.part.chunks(), None)
            first = next(texts_of(chunk, place.column, self.config.text_separator), "") if chunk is not None else ""
            if isinstance(first, Bad):
                raise first.error()

    def sample(self, characters: int) -> list[str]:
        """The first documents of the text, up to so many characters; bad records are the workers' to tell.

        Of a few chunks: where they hold no text at all, what follows is not read only to find some.
        """
        found: list[str] = []
        chunks = ((place, chunk) for place in self.places for chunk in place.part.chunks())
        for place, chunk in islice(chunks, CHUNKS_SAMPLED):
            for text in texts_of(chunk, place.column, self.config.text_separator):
                if isinstance(text, str):
                    found.append(text[:characters])
                    characters -= len(text)
                if characters <= 0:
                    return found
        return found

    def stretches(self, work: WorkFolder) -> list[Stretch]:
        """The units of all sources, in order; all of them must be there."""
        places, found = self.places, []
        for source, split in dict.fromkeys((place.source, place.split) for place in places):
            units: list[UnitFile] = []
            for place in places:
                if (place.source, place.split) == (source, split):
                    units += (UnitFile(work.unit(place.id, n)) for n in range(place.num_chunks(work) or 0))
            found.append(Stretch(source, split, tuple(units)))
        return found

    def check_text(self, stretches: Sequence[Stretch]) -> None:
        """UserError where a split of a source has no text at all."""
        for stretch in stretches:
            entry = self.config.entries()[stretch.source]
            documents = sum(len(unit.read("lengths")[0]) for unit in stretch.units)
            if not documents:
                notes = [unit.notes() for unit in stretch.units]
                empty, bad = sum(empty for empty, _ in notes), sum(len(bad) for _, bad in notes)
                and_bad = f", {bad} bad records" if bad else ""
                raise UserError(
                    f"split {stretch.split} of data.source={entry.source} holds no text in column {entry.text_column} "
                    f"({empty} empty documents{and_bad}); check data.source, the split and data.text_column"
                )
