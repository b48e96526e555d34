"""Dashboards beside W&B, by Accelerate's tracker classes: TensorBoard, Trackio, MLflow."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from clm_dist.config import Config
from clm_dist.publish import outbox
from clm_dist.publish.rows import Row, Unsent, kinds, waiting
from clm_dist.recipe import flat


class Board(ABC):
    """Rows go out in order; the newest step that arrived is noted after each."""

    name: str
    noted_at_once = True  # a row has arrived when `log` returns

    def __init__(self, run: Path, config: Config) -> None:
        self.folder, self.config = run, config
        self.ended: str | None = None
        self.tracker: Any = None
        self._unsent: Unsent | None = None

    @abstractmethod
    def open(self, sent: dict[str, int]) -> Any:
        """Accelerate's tracker, going on after the steps that were sent. It may correct `sent` by what the board has."""

    def deliver(self) -> bool:
        """Opens the board where that is to be done, and logs what waits."""
        if self.tracker is None:
            _alone()
            sent = dict(outbox.notes(self.folder, self.name).get("sent", {}))
            self.tracker = self.open(sent)
            self._unsent = Unsent(self.folder, sent)
        try:
            self._log_rows()
        except Exception:
            self.tracker = None  # the next try opens it anew, and looks at what it has
            raise
        return True

    def _log_rows(self) -> None:
        assert self._unsent is not None
        for row in self._unsent.rows(self.ended is not None):
            self.log(row)
            self._unsent.mark(row)
            if self.noted_at_once:
                outbox.note(self.folder, self.name, sent=self._unsent.sent)

    def log(self, row: Row) -> None:
        """One row."""
        if row.figures:
            self.tracker.log(row.figures, step=row.step)

    def close(self) -> None:
        """The board is left as it should be."""
        if self.tracker is not None:
            self.tracker.finish()

    def missing(self) -> str | None:
        """By the notes."""
        return waiting(self.folder, outbox.notes(self.folder, self.name).get("sent", {}))

    @property
    def title(self) -> str:
        """What the run is called on the board."""
        return self.config.track.name or self.folder.resolve().name


class TensorBoard(Board):
    """Event files in the run folder, for `tensorboard --logdir RUN`."""

    name = "tensorboard"

    def open(self, sent: dict[str, int]) -> Any:
        """Events of later steps, of a courier that was killed before it noted them, no longer count."""
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker("tensorboard", self.folder, purge_step=max(sent.values(), default=-1) + 1)
        tracker.start()
        rows = [f"|{name}|{value}|" for name, value in flat(self.config).items()]
        tracker.writer.add_text("config", "\n".join(["|field|value|", "|---|---|", *rows]))
        return tracker

    def log(self, row: Row) -> None:
        """With the texts of the step."""
        super().log(row)
        for number, sample in enumerate(row.samples):
            self.tracker.writer.add_text(f"samples/{number}", f"**{sample['prompt']}** {sample['text']}", row.step)
        self.tracker.writer.flush()


class Trackio(Board):
    """A local SQLite database (of TRACKIO_DIR), for `trackio show`."""

    name = "trackio"
    noted_at_once = False  # its client writes behind our back

    def open(self, sent: dict[str, int]) -> Any:
        """Rows that are in the database count as sent, whatever was noted."""
        from accelerate.tracking import TrackioTracker

        sent.update(self.stored())
        # it knows runs by name alone, and many folders are called `run`
        name = f"{self.title}-{outbox.notes(self.folder, outbox.IDS)['wandb']}"
        tracker = TrackioTracker(
            self.config.track.project, name=name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )
        outbox.note(self.folder, self.name, run_name=name)
        tracker.start()
        if not sent:
            tracker.store_init_configuration(flat(self.config))
        return tracker

    def close(self) -> None:
        """What its client still holds is written, and noted."""
        super().close()
        outbox.note(self.folder, self.name, sent=self.stored())

    def stored(self) -> dict[str, int]:
        """The newest step of each kind of row in the database. Texts are not sent: those of its newest row count."""
        from trackio.sqlite_storage import SQLiteStorage

        name = outbox.notes(self.folder, self.name).get("run_name")
        rows = SQLiteStorage.get_logs(self.config.track.project, name) if name else []
        steps = {kind: row["step"] for row in rows for kind in kinds(row)}
        return {**steps, "samples": max(steps.values())} if steps else {}


class MLflow(Board):
    """A run on the server of MLFLOW_TRACKING_URI, or in a database in the run folder."""

    name = "mlflow"

    def open(self, sent: dict[str, int]) -> Any:
        """The run of before goes on; what it has counts as sent, whatever was noted."""
        import mlflow
        from accelerate.tracking import MLflowTracker

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{self.folder.resolve()}/mlflow.db")
        known = outbox.notes(self.folder, self.name).get("run_id")
        tracker = MLflowTracker(self.config.track.project, run_id=known, run_name=self.title)
        tracker.start()
        if known is None:
            outbox.note(self.folder, self.name, run_id=tracker.active_run.info.run_id)
            tracker.store_init_configuration(flat(self.config))
            return tracker
        client = mlflow.MlflowClient()
        for kind, metric in (("train", "train/lr"), ("eval", "eval/loss")):
            steps = [one.step for one in client.get_metric_history(known, metric)]
            sent |= {kind: max(steps)} if steps else {}
        return tracker


def _alone() -> None:
    """Accelerate's trackers ask which process they are: a plain one, which must not take memory of a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from accelerate import PartialState

    PartialState(cpu=True)
