"""Metrics: metrics.jsonl always, dashboards on top. Only the main process opens anything."""

import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from clm_dist.config import Config
from clm_dist.errors import UserError
from clm_dist.recipe import leaves


class Tracker(Protocol):
    """What a dashboard has to do."""

    def log(self, values: dict[str, float], step: int) -> None:
        """One row of metrics."""
        ...

    def finish(self) -> None:
        """No more rows."""
        ...


def check_installed(config: Config) -> None:
    """Refuses a tracker whose package is missing, before anything starts."""
    for name in config.track.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"track.trackers names {name}, which is not installed; run `pip install clm-dist[{name}]` or leave it out"
            )


def open_trackers(config: Config, folder: Path, ids: dict[str, str], step: int) -> tuple[list[Tracker], dict[str, str]]:
    """metrics.jsonl and whatever dashboards the recipe names; and the ids by which they know the run. On the main process.

    ids: those of before, in a run that goes on after `step`.
    """
    opened: list[Tracker] = [MetricsFile(folder / "metrics.jsonl")]
    for name in config.track.trackers:
        if name == "tensorboard":
            opened.append(TensorBoard(config, folder, step))
        else:
            opened.append(board := WeightsAndBiases(config, folder, ids.get("wandb")))
            ids = {**ids, "wandb": board.run.id}
    return opened, ids


class MetricsFile:
    """metrics.jsonl: one JSON object a row, `step` and `time` first; the truth that every report is made from."""

    def __init__(self, path: Path) -> None:
        self.file: TextIO = path.open("a", encoding="utf-8", buffering=1)  # a line is on disk when it is logged

    def log(self, values: dict[str, float], step: int) -> None:
        # a step without a finite loss is a row without a figure: JSON has no NaN
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")

    def finish(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir RUN`."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        rows = [f"|{name}|{value}|" for name, value in flat(config).items()]
        self.writer.add_text("config", "\n".join(["|field|value|", "|---|---|", *rows]))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A W&B run; offline it lies in the run folder until `wandb sync`. The key comes from WANDB_API_KEY only."""

    def __init__(self, config: Config, folder: Path, run_id: str | None) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=config.track.project,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=config.track.wandb_mode,
            config=flat(config),
            # batch systems keep the console already; the log is flushed often because a killed job loses its buffer
            settings=wandb.Settings(console="off", x_transaction_log_flush_interval=1),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({"trainer/step": step, **values}, step=step)

    def finish(self) -> None:
        self.run.finish()


def flat(config: Config) -> dict[str, Any]:
    """The configuration by dotted names; lists and mappings as JSON text."""
    result = {}
    for name, _ in leaves():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        result[name] = json.dumps(value) if isinstance(value, (dict, tuple)) else value
    return result
