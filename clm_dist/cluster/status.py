"""How a run is doing: from its folder, and from Slurm where that knows of it. Reads only."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clm_dist import recipe
from clm_dist.cluster import slurm
from clm_dist.cluster.submission import FOLDER, read_record
from clm_dist.errors import EXIT_MISCONFIGURED, UserError
from clm_dist.ledger import ledger
from clm_dist.ledger.goodput import goodput
from clm_dist.storage import read_object
from clm_dist.watch import failure
from clm_dist.watch.watch import FOLDER as SIGNS

ALIVE = 15  # seconds since a process showed life: they do so every second
LEAVING = 3  # seconds for which processes show life after the run's end
RECENT = 100  # steps that tell how long the rest will take


@dataclass
class Status:
    """Of one run."""

    run: str
    state: str  # waiting, running, saved, finished, failed, misconfigured, stopped, not begun
    detail: str = ""
    job: dict[str, str] = field(default_factory=dict)  # id, state, nodes, reason
    starts: int = 0
    step: int = 0
    max_steps: int | None = None
    tokens: int = 0
    loss: float | None = None
    goodput: float | None = None
    seconds_left: float | None = None
    outbox: dict[str, str] = field(default_factory=dict)  # destinations that lack something, and what

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        lines = [f"{self.run}: {self.state}" + (f" ({self.detail})" if self.detail else "")]
        if self.job:
            reason = f", {self.job['reason']}" if self.job.get("reason") else ""
            nodes = f" on {self.job['nodes']}" if self.job.get("nodes") else ""
            lines.append(f"  job {self.job['id']} {self.job.get('state', '')}{nodes}{reason}")
        if self.max_steps:
            share = f"{self.step / self.max_steps:.1%}"
            loss = "" if self.loss is None else f", loss {self.loss:.4f}"
            lines.append(f"  step {self.step:,} of {self.max_steps:,} ({share}), {self.tokens:,} tokens{loss}")
            again = self.starts - 1
            useful = "" if self.goodput is None else f"goodput {self.goodput:.1%}"
            left = "" if not self.seconds_left else f"about {_clock(self.seconds_left)} left"
            lines.append("  " + ", ".join(filter(None, [f"started again {again} times", useful, left])))
        lines += [f"  outbox, {name}: {problem}" for name, problem in self.outbox.items()]
        return "\n".join(lines)


def status(run: Path) -> list[Status]:
    """Of a run, or of each run of a sweep."""
    if not run.is_dir():
        raise UserError(f"{run} is no folder; give the run_dir of a run, or what `clm-dist submit` printed")
    record = read_record(run / FOLDER)
    if record and record.get("runs"):
        return [
            _status(run / str(number), run / FOLDER, f"{record['job']}_{number}") for number in range(record["runs"])
        ]
    if record is None and run.name.isdigit() and (outer := read_record(run.parent / FOLDER)) and outer.get("runs"):
        return [_status(run, run.parent / FOLDER, f"{outer['job']}_{run.name}")]
    if record is None and not (run / "config.yaml").is_file() and not (run / failure.FAILURE).is_file():
        raise UserError(f"{run} holds no run and no job; give the run_dir of a recipe that was trained or submitted")
    return [_status(run, run / FOLDER, record["job"] if record else None)]


def _status(run: Path, folder: Path, job_id: str | None) -> Status:
    known = slurm.job(job_id) if job_id else {}
    path = run / "ledger.jsonl"
    rows = ledger.read(path)[0] if path.is_file() else []
    found = Status(str(run), *_state(run, folder, job_id, known, rows))
    if job_id:
        nodes = known.get("NodeList", "").replace("(null)", "")
        reason = known.get("Reason", "None")
        found.job = {"id": job_id, "state": known.get("JobState", ""), "nodes": nodes}
        found.job |= {"reason": reason} if reason != "None" else {}
    if rows:
        _progress(found, run, rows)
    for note in sorted((run / "outbox").glob("*.json")):
        values = read_object(note)
        if values.get("problem"):
            found.outbox[note.stem] = str(values["problem"])
    return found


def _state(run: Path, folder: Path, job_id: str | None, known: dict[str, str], rows: list[Any]) -> tuple[str, str]:
    """In one word, and what there is to say about it."""
    in_queue = known.get("JobState", "")
    if in_queue == "PENDING" or in_queue == "REQUEUED":
        return ("saved", "waits in the queue to go on") if rows else ("waiting", "in the queue")
    ended = rows[-1].get("state", "") if rows and rows[-1]["event"] == "end" else ""
    since = rows[-1]["time"] + LEAVING if ended else 0.0  # a later sign is of a new start
    if in_queue in slurm.IN_QUEUE or (not in_queue and _alive(run, since)):
        return "running", ""
    failed = failure.read(run)
    if failed is not None:
        return "failed", failed.line()
    if ended == "finished":
        return "finished", ""
    if job_id and _outcome(folder, job_id) == EXIT_MISCONFIGURED:
        return "misconfigured", f"see {folder / f'job-{job_id}.log'}"
    if ended in ("preempted", "interrupted"):
        return "saved", f"{ended}; the same command goes on"
    if in_queue:
        return "failed", f"Slurm says {in_queue}; see {folder / f'job-{job_id}.log'}"
    return ("stopped", "its processes are gone without a word; the same command goes on") if rows else ("not begun", "")


def _alive(run: Path, since: float) -> bool:
    """Whether a process of it showed life a moment ago, and after `since`."""
    signs = [path.stat().st_mtime for path in (run / SIGNS).glob("rank-*.json")]
    return bool(signs) and max(signs) > max(since, time.time() - ALIVE)


def _outcome(folder: Path, job_id: str) -> int | None:
    """The exit code of the job's newest start."""
    starts = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"outcome-{job_id}-*")}
    try:
        return int(starts[max(starts)].read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None


def _progress(found: Status, run: Path, rows: list[dict[str, Any]]) -> None:
    starts = [row for row in rows if row["event"] == "start"]
    steps = [row for row in rows if row["event"] in ("start", "step", "rewind")]
    plan = starts[-1]["plan"]
    found.starts, found.step, found.max_steps = len(starts), steps[-1]["step"], plan["max_steps"]
    config = recipe.load(run / "config.yaml", [])
    found.tokens = found.step * plan["global_batch_size"] * config.data.block_size
    losses = [row["train/loss"] for row in _rows(run / "metrics.jsonl") if "train/loss" in row]
    found.loss = losses[-1] if losses else None
    seconds = goodput(rows)
    wall = sum(seconds.values())
    found.goodput = seconds["training"] / wall if wall else None
    recent = [row for row in rows[rows.index(starts[-1]) :] if row["event"] == "step"][-RECENT:]
    if len(recent) > 1:  # by the clock, so that evaluations and saves count
        each = (recent[-1]["time"] - recent[0]["time"]) / (len(recent) - 1)
        found.seconds_left = round(each * (found.max_steps - found.step), 1)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Of a file that grows: its last line may not be whole yet."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"
