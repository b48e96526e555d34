"""Documents from a data set on the Hub, pinned to the commit that was there when `prepare` ran."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clm_dist import hub
from clm_dist.config import MixtureEntry
from clm_dist.data.files import ROWS_PER_BATCH
from clm_dist.data.records import CHUNK_BYTES, Chunk, Tables
from clm_dist.data.source import Part
from clm_dist.errors import RunError, UserError


class HubSource:
    """Documents by split from `datasets.load_dataset`: fetched first, or as they come (`streaming`)."""

    def __init__(self, entry: MixtureEntry, splits: list[str], streaming: bool) -> None:
        self.entry = entry
        self.names = splits
        self.streaming = streaming
        self.newest = _newest_commit(entry)  # at once: what may not be read is refused before anything is fetched

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The data itself, fetched (or opened for streaming) when first asked for."""
        return {split: _load(self.entry, split, self.newest, self.streaming) for split in self.names}

    def identity(self) -> dict[str, Any]:
        """Name, configuration and commit, which together say what every row is."""
        revision = self.newest or _cached_commit(self.entry, self.splits)
        return {"id": self.entry.source, "config": self.entry.config_name, "revision": revision}

    def parts(self, split: str) -> list[Part]:
        """Streamed: one a data file, so that shards need not fetch each other's. Else the whole table."""
        data, name = self.splits[split], f"{self.entry.source}, split {split}"
        identity = "hub:" + ":".join(map(str, (*self.identity().values(), split)))
        column = str(self.entry.text_column)
        if not self.streaming:
            return [HubPart(name, identity, column, data)]
        number = data.num_shards
        shards = [data.shard(num_shards=number, index=index) for index in range(number)]
        return [
            HubPart(f"{name}, file {index + 1} of {number}", f"{identity}:{index}/{number}", column, shard)
            for index, shard in enumerate(shards)
        ]


@dataclass(frozen=True)
class HubPart:
    """A `datasets` table or stream."""

    name: str
    key: str
    column: str
    data: Any = field(repr=False)
    bytes: None = None

    def num_chunks(self) -> None:
        """Only reading tells."""

    def check_unchanged(self) -> None:
        """A commit does not change."""

    def chunks(self, first: int = 0) -> Iterator[Chunk]:
        """The chunks in order from number `first` on."""
        for number, chunk in enumerate(self._chunks()):
            if number >= first:
                yield chunk

    def _chunks(self) -> Iterator[Chunk]:
        top = self.column.split(".")[0]
        columns = self.data.column_names or []
        data = self.data.select_columns([top]) if top in columns and self.column not in columns else self.data
        held: list[Any] = []
        start, number, size = 1, 1, 0
        try:
            for table in data.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
                held += table.to_batches()
                number += len(table)
                size += table.nbytes
                if size >= CHUNK_BYTES:
                    yield Tables(self.name, held, start)
                    held, start, size = [], number, 0
        except Exception as error:  # of a reader of any format, or of the HTTP library in the midst of a stream
            # no bad record: it may be whole the next time, and then what follows it has to be read
            reason = " ".join(str(error.__cause__ or error).split())
            raise RunError(
                f"{self.name} cannot be read on at record {number} ({type(error).__name__}: {reason})"
            ) from None
        if held:
            yield Tables(self.name, held, start)


def _newest_commit(entry: MixtureEntry) -> str | None:
    """The commit that `revision` (or the default branch) names now; None with HF_HUB_OFFLINE=1.

    `datasets` falls back to the newest cached copy with only a warning when the Hub refuses or is silent; with a
    commit in the manifest that cannot pass unnoticed.
    """
    try:
        return hub.resolve("dataset", str(entry.source), entry.revision)
    except Exception as error:  # of the HTTP library, which is another one from version to version of huggingface_hub
        raise hub.refused(
            error, "dataset", str(entry.source), entry.revision, "data.source", "or give a local file"
        ) from None


def _cached_commit(entry: MixtureEntry, splits: dict[str, Any]) -> str:
    """The commit of a cached copy: `datasets` calls the folder by it, and gives the newest whatever was asked for."""
    if any(not hasattr(data, "cache_files") for data in splits.values()):
        raise UserError(
            f"data.streaming=true reads data.source={entry.source} from the Hub, and HF_HUB_OFFLINE=1 forbids that; "
            "unset one of them"
        )
    commits = {Path(file["filename"]).parent.name for data in splits.values() for file in data.cache_files}
    if len(commits) != 1 or entry.revision not in (None, *commits):
        raise UserError(
            f"the cache holds data.source={entry.source} as of commit {', '.join(sorted(commits)) or 'unknown'}, not "
            f"{entry.revision or 'one for all splits'}; set data.revision to that commit, or fetch without HF_HUB_OFFLINE"
        )
    return commits.pop()


def _load(entry: MixtureEntry, split: str, revision: str | None, streaming: bool) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(
            entry.source, entry.config_name, split=split, revision=revision, streaming=streaming
        )
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if hub.explain(error, "dataset", str(entry.source), revision) is not None:
            remedy = "or give a local file of the same schema"
            raise hub.refused(error, "dataset", str(entry.source), revision, "data.source", remedy) from None
        reason = " ".join(str(error.__cause__ or error).split())  # DatasetGenerationError alone says nothing
        raise UserError(
            f"cannot load data.source={entry.source}, split {split}: {reason}; "
            "check name and split, or give a local file of the same schema as data.source"
        ) from None
