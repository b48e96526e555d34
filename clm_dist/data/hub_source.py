"""Documents from a data set on the Hub, pinned to the commit that was there when `prepare` ran."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from clm_dist.config import DataConfig
from clm_dist.data.source import text_of
from clm_dist.errors import UserError


class HubSource:
    """Documents by split from `datasets.load_dataset`; streaming is not used: the set is read twice."""

    def __init__(self, config: DataConfig, splits: list[str]) -> None:
        self.config = config
        self.names = splits
        self.newest = _newest_commit(config)  # at once: what may not be read is refused before anything is fetched

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The data itself, fetched when first asked for."""
        return {split: _load(self.config, split, self.newest) for split in self.names}

    def identity(self) -> dict[str, Any]:
        rows = {split: data.num_rows for split, data in self.splits.items()}
        return {
            "id": self.config.source,
            "config": self.config.config_name,
            "revision": self.newest or _cached_commit(self.config, self.splits),
            "rows": rows,
        }

    def texts(self, split: str) -> Iterator[str]:
        top = self.config.text_column.split(".")[0]
        data = self.splits[split]
        if top in data.column_names:  # the other columns need not be read
            data = data.select_columns([top])
        for number, record in enumerate(data, 1):
            where = f"{self.config.source}, split {split}, record {number}"
            yield text_of(record, self.config.text_column, self.config.text_separator, where)


def _newest_commit(config: DataConfig) -> str | None:
    """The commit that `revision` (or the default branch) names now; None with HF_HUB_OFFLINE=1.

    `datasets` falls back to the newest cached copy with only a warning when the Hub refuses or is silent; with a
    commit in the manifest that cannot pass unnoticed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(config.source, revision=config.revision).sha
    except OfflineModeIsEnabled:
        return None
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"the Hub has no data set {config.source} (revision {config.revision or 'newest'}) that you may read: "
            f"{str(error).splitlines()[0]}; check the name, set HF_TOKEN for a private set, or give a local file as "
            "data.source"
        ) from None
    except Exception as error:  # of the HTTP library, which is another one from version to version of huggingface_hub
        raise UserError(
            f"cannot ask the Hub for data.source={config.source}: {error}; check the connection, set HF_HUB_OFFLINE=1 "
            "to use what was fetched before, or give a local file as data.source"
        ) from None


def _cached_commit(config: DataConfig, splits: dict[str, Any]) -> str:
    """The commit of a cached copy: `datasets` calls the folder by it, and gives the newest whatever was asked for."""
    commits = {Path(file["filename"]).parent.name for data in splits.values() for file in data.cache_files}
    if len(commits) != 1 or config.revision not in (None, *commits):
        raise UserError(
            f"the cache holds data.source={config.source} as of commit {', '.join(sorted(commits)) or 'unknown'}, not "
            f"{config.revision or 'one for all splits'}; set data.revision to that commit, or fetch without HF_HUB_OFFLINE"
        )
    return commits.pop()


def _load(config: DataConfig, split: str, revision: str | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(config.source, config.config_name, split=split, revision=revision)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())  # DatasetGenerationError alone says nothing
        raise UserError(
            f"cannot load data.source={config.source}, split {split}: {reason}; "
            "check name and split, or give a local file of the same schema as data.source"
        ) from None
