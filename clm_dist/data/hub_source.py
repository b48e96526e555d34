"""Documents from a data set on the Hub, pinned to the commit that was there when `prepare` ran."""

from collections.abc import Iterator
from typing import Any

from clm_dist.config import DataConfig
from clm_dist.data.source import text_of
from clm_dist.errors import UserError


class HubSource:
    """Documents by split from `datasets.load_dataset`; streaming is not used: the set is read twice."""

    def __init__(self, config: DataConfig, splits: list[str]) -> None:
        self.config = config
        self.revision = _newest_commit(config)
        self.splits = {split: _load(config, split, self.revision) for split in splits}

    def identity(self) -> dict[str, Any]:
        rows = {split: data.num_rows for split, data in self.splits.items()}
        return {
            "id": self.config.source,
            "config": self.config.config_name,
            "revision": self.revision,
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
    """The commit that `revision` (or the default branch) names now; None where the Hub cannot be asked.

    `datasets` falls back to the newest cached copy with only a warning when the Hub refuses or is silent; with a
    commit in the manifest that cannot pass unnoticed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(config.source, revision=config.revision).sha
    except HfHubHTTPError as error:
        raise UserError(
            f"the Hub has no data set {config.source} (revision {config.revision or 'newest'}) that you may read: "
            f"{str(error).splitlines()[0]}; check the name, set HF_TOKEN for a private set, or give a local file as "
            "data.source"
        ) from None
    except (OfflineModeIsEnabled, OSError, RuntimeError):
        return config.revision  # offline: `datasets` answers from its cache or says that it cannot


def _load(config: DataConfig, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(config.source, config.config_name, split=split, revision=revision)
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(
            f"cannot load data.source={config.source}, split {split}: {' '.join(str(error).split())}; "
            "check name and split, or give a local file of the same schema as data.source"
        ) from None
