"""W&B: rows of metrics.jsonl to one run there, each exactly once, whatever was killed on the way.

Every row is written to RUN/outbox/wandb.rows before W&B's client gets it: line k of that file is row k of the W&B run. The
server tells how many rows it has, so what was lost on the way is cut from the file and sent again, and nothing else is.
"""

import json
import netrc
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clm_dist.config import Config
from clm_dist.publish import outbox
from clm_dist.publish.courier import FOLLOWED, OfflineError
from clm_dist.publish.rows import Row, Unsent, waiting
from clm_dist.recipe import flat
from clm_dist.storage import read_object, write_text

URL = "https://api.wandb.ai"
CONFIRM_EVERY = 30.0  # seconds between questions to the server, how much it has
LAG = 15.0  # seconds that a server may take to count what it has just confirmed
ROUTE = 1.5  # seconds in which `auto` has to find a route
TRIES = 4  # at opening the run, while rows still come in
INIT = 30.0  # seconds for W&B's client to open a run, after the server has answered us
QUERY = """query Arrived($project: String!, $entity: String, $run: String!) {
  viewer { entity }
  model(name: $project, entityName: $entity) { bucket(name: $run) { historyLineCount historyTail } }
}"""


class WeightsAndBiases:
    """The W&B run of a run folder. The key comes from WANDB_API_KEY or ~/.netrc, and is written nowhere."""

    name = "wandb"

    def __init__(self, run: Path, config: Config) -> None:
        self.folder, self.config = run, config
        self.ended: str | None = None
        self.run: Any = None  # W&B's, once it is open
        self.journal = run / outbox.FOLDER / "wandb.rows"
        self._unsent: Unsent | None = None
        self._confirmed_at = 0.0
        self._follows = FOLLOWED in os.environ

    def deliver(self) -> bool:
        """Opens the run where that is to be done, hands what waits to W&B's client, asks the server now and then."""
        if self.run is None:
            self._check_mode()
            self._begin()
        elif time.monotonic() - self._confirmed_at > CONFIRM_EVERY:
            self._arrived()
        try:
            self._log_rows()
        except Exception:
            self._abandon()
            raise
        return True

    def _begin(self) -> None:
        """Opens the run where the server's rows end."""
        for _ in range(TRIES):
            arrived, last = self._arrived()
            self._cut_journal(arrived, last)
            self.run = self._open()
            if self.run.starting_step == arrived:
                return
            self._abandon()  # rows of a client that was killed still came in, or the notes were lost: now they are known
            time.sleep(1)
        raise ConnectionError("W&B has other rows each time it is asked; does something else write into this run?")

    def _log_rows(self) -> None:
        assert self._unsent is not None
        for row in self._unsent.rows(self.ended is not None):
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": row.step, "kinds": sorted(row.kinds)}) + "\n")
            self.run.log(self._values(row))  # never with step=: W&B would drop what is not newer than its own count
            self._unsent.mark(row)

    def _abandon(self) -> None:
        """The disk was full, or W&B's client has died: the next try asks the server what it has, and begins from there."""
        import wandb

        self.run = None
        with suppress(Exception):
            wandb.teardown()

    def close(self) -> None:
        """W&B's client uploads the rest; then the server is asked whether it has all."""
        if self.run is None:
            return
        if self.ended not in ("finished", "gone"):
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if self.ended == "finished" else 1)
        wanted, deadline = len(self._rows()), time.monotonic() + LAG
        while self._arrived()[0] < wanted and time.monotonic() < deadline:
            time.sleep(1)

    def missing(self) -> str | None:
        """By the notes: rows of which the server has not said that it has them."""
        return waiting(self.folder, _sent(self._rows()[: outbox.notes(self.folder, self.name).get("arrived", 0)]))

    def _check_mode(self) -> None:
        """Raises OfflineError where nothing is to be sent now."""
        mode = os.environ.get("WANDB_MODE") or (self.config.track.wandb_mode if self._follows else "online")
        if mode in ("offline", "dryrun", "disabled"):
            where = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "track.wandb_mode"
            raise OfflineError(f"{where}={mode}")
        url = os.environ.get("WANDB_BASE_URL", URL)
        if _key(url) is None:
            raise OfflineError("no key: set WANDB_API_KEY, or run `wandb login` once")
        if mode == "auto":
            try:
                self._arrived(ROUTE)
            except ConnectionError as error:
                raise OfflineError(str(error)) from None

    def _arrived(self, seconds: float = 10) -> tuple[int, int]:
        """How many rows the server has, and the step of the last; ConnectionError where it does not say."""
        import requests

        known, url = outbox.notes(self.folder, self.name), os.environ.get("WANDB_BASE_URL", URL)
        variables: dict[str, Any] = {"project": known.get("project", self.config.track.project), "run": self._id()}
        variables["entity"] = known.get("entity")
        question: Any = {"query": QUERY, "operationName": "Arrived", "variables": variables}
        try:
            answer = requests.post(f"{url}/graphql", json=question, auth=("api", _key(url) or ""), timeout=seconds)
        except requests.RequestException as error:
            raise ConnectionError(f"no answer from {url} ({type(error).__name__})") from None
        if answer.status_code in (401, 403):
            raise PermissionError(f"{url} refuses the key (status {answer.status_code}); check WANDB_API_KEY")
        if not answer.ok:
            raise ConnectionError(f"{url} answers {answer.status_code}")
        data = answer.json().get("data") or {}
        if not data.get("viewer"):
            raise PermissionError(f"{url} does not know the key; check WANDB_API_KEY")
        bucket = (data.get("model") or {}).get("bucket") if "entity" in known else None
        count, tail = _tail(bucket)
        outbox.note(self.folder, self.name, arrived=count)
        self._confirmed_at = time.monotonic()
        return count, int(tail.get("trainer/step", -1))

    def _cut_journal(self, arrived: int, last: int) -> None:
        """The journal becomes what the server has; a journal that was lost becomes all up to its last step."""
        rows = self._rows()[:arrived]
        rows += [{"step": last, "kinds": ["eval", "samples", "train"]}] * (arrived - len(rows))
        write_text(self.journal, "".join(json.dumps(row) + "\n" for row in rows))
        self._unsent = Unsent(self.folder, _sent(rows))

    def _open(self) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it looks for hosts beside the server
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)  # an empty one is refused
        import wandb

        track, known = self.config.track, outbox.notes(self.folder, self.name)
        ids = outbox.notes(self.folder, outbox.IDS)
        followed = os.environ.get(FOLLOWED)
        environment = read_object(self.folder / "environment.json")
        settings: dict[str, Any] = {
            "console": "off",  # batch systems keep the console already
            "silent": True,
            "init_timeout": INIT,
            "disable_git": True,  # it would describe the working folder, and upload its changes
            "save_code": False,
            "x_transaction_log_flush_interval": 1,
            "x_disable_stats": followed is None,  # of the node that trains, not of one that delivers
            "x_disable_machine_info": followed is None,
            **({"x_stats_pid": int(followed)} if followed else {}),
            **({"git_commit": environment["commit"].partition("-")[0]} if environment.get("commit") else {}),
        }
        run = wandb.init(
            entity=known.get("entity") or track.entity,
            project=known.get("project") or track.project,
            name=track.name or self.folder.resolve().name,
            group=track.group or ids.get("group"),
            tags=list(track.tags) or None,
            id=ids["wandb"],
            resume="allow",
            dir=str(self.folder),
            mode="online",
            settings=wandb.Settings(**settings),
        )
        run.config.update({**flat(self.config), "environment": environment}, allow_val_change=True)
        run.define_metric("trainer/step", hidden=True)
        run.define_metric("trainer/tokens")
        run.define_metric("*", step_metric="trainer/step")
        outbox.note(self.folder, self.name, entity=run.entity, project=run.project, url=run.url)
        return run

    def _values(self, row: Row) -> dict[str, Any]:
        tokens_per_step = self.config.train.global_batch_size * self.config.data.block_size
        values: dict[str, Any] = {"trainer/step": row.step, "trainer/tokens": row.step * tokens_per_step, **row.figures}
        if row.time:
            values["_timestamp"] = row.time  # when it was trained, not when it arrived
        if row.samples:
            import wandb

            rows = [[row.step, sample["prompt"], sample["text"]] for sample in row.samples]
            values["samples"] = wandb.Table(columns=["step", "prompt", "text"], data=rows)
        return values

    def _id(self) -> str:
        return str(outbox.notes(self.folder, outbox.IDS)["wandb"])

    def _rows(self) -> list[dict[str, Any]]:
        if not self.journal.exists():
            return []
        text = self.journal.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _sent(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The newest step of each kind."""
    return {kind: row["step"] for row in rows for kind in row["kinds"]}


def _tail(bucket: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """Rows of a W&B run as its own client counts them, and the last one."""
    if not bucket:
        return 0, {}
    lines = json.loads(bucket.get("historyTail") or "[]")
    last = json.loads(lines[-1]) if lines else {}
    return int(last.get("_step", bucket.get("historyLineCount", 0) - 1)) + 1, last


def _key(url: str) -> str | None:
    """WANDB_API_KEY, or what `wandb login` has left in ~/.netrc."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
