"""RUN/outbox/hub/: what waits to be pushed, each item a snapshot of exactly what will be uploaded.

    00000500-model/  item.json  files/      hard links to an exported folder (copies where there are none), so that
                                            training may write the next one over it

An item is written beside its place and renamed, and is removed when the Hub has all of it.
"""

import fcntl
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from clm_dist.config import HubConfig
from clm_dist.errors import UserError
from clm_dist.publish.card import public_values
from clm_dist.publish.report import write_report
from clm_dist.storage import write_text

OUTBOX = Path("outbox", "hub")
NOTES = OUTBOX / "delivered.json"
FACTS, RECIPE, REPORT = "evaluation.json", "recipe.yaml", "report.html"
ADAPTER = "adapter/adapter_model.safetensors"  # by itself, beside weights that hold it already
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", ADAPTER)
# All that is ever uploaded: weights, configurations, the tokenizer's files, and what is said of the model.
ALLOWED = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "adapter/adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja"),
    *("README.md", "curves.png", FACTS, RECIPE, REPORT),
)


@dataclass(frozen=True)
class Item:
    """One push that waits."""

    step: int
    what: str  # model, model_best
    run: str  # which run made it
    learned: str  # a hash of all that it was learned from
    repo: str
    private: bool
    branch: str
    tag: str | None
    replace: bool

    @property
    def name(self) -> str:
        return f"{self.step:08d}-{self.what}"


def allowed(name: str) -> bool:
    """Whether a file of this name may be uploaded."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or says where they are."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in WEIGHTS)


def queue(run: Path, folder: Path, what: str, hub: HubConfig) -> Item:
    """Puts an exported folder into the outbox. One process only."""
    facts = read_facts(folder)
    tag = f"step-{facts['step']}" if hub.tag_steps else None
    item = Item(
        *(int(facts["step"]), what, facts["run"], facts["learned"], str(hub.repo)),
        *(hub.private, hub.branch, tag, hub.replace),
    )
    place = run / OUTBOX / item.name
    staged = place.with_name(f".{item.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "files").mkdir(parents=True)
    for name, path in _allowed(folder).items():
        (staged / "files" / name).parent.mkdir(exist_ok=True)
        _link(path, staged / "files" / name)
    public = yaml.safe_dump(
        public_values(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))),
        sort_keys=False, allow_unicode=True,
    )  # fmt: skip
    (staged / "files" / RECIPE).write_text(public, encoding="utf-8")
    write_report(run, staged / "files" / REPORT, recipe=public)
    (staged / "item.json").write_text(json.dumps(asdict(item), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    staged.rename(place)
    if what == "model_best":
        _drop_superseded(run, item)
    return item


def read_facts(folder: Path) -> dict[str, Any]:
    """evaluation.json of an exported folder; UserError where there is no model, or none that says what it is."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model yet; push when there is one, or another one by --what")
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return {"step": facts["step"], "run": facts["run"], "learned": facts["learned"], **facts}
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder}/{FACTS} is missing or damaged, so it is not known of which step the model is; take another one by "
            "--what, or train again"
        ) from None


def waiting(run: Path) -> list[Item]:
    """What waits, first the earliest step."""
    found = sorted((run / OUTBOX).glob("[0-9]*/item.json"))
    return [Item(**json.loads(path.read_text(encoding="utf-8"))) for path in found]


def files_of(run: Path, item: Item) -> dict[str, Path]:
    """What will be uploaded, by name."""
    return _allowed(run / OUTBOX / item.name / "files")


def _allowed(folder: Path) -> dict[str, Path]:
    files = {str(path.relative_to(folder).as_posix()): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if allowed(name)}


def change(run: Path, item: Item) -> None:
    """Writes down where and how a waiting item is to go now."""
    write_text(run / OUTBOX / item.name / "item.json", json.dumps(asdict(item), indent=2) + "\n")


def delivered(run: Path) -> list[dict[str, Any]]:
    """What was delivered, in its order."""
    path = run / NOTES
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["delivered"])
    except (ValueError, KeyError, TypeError):
        return []  # the Hub itself says what it has


def note_delivered(run: Path, item: Item, commit: str) -> None:
    """Notes a delivery and removes the item. In this order: what is noted twice does no harm."""
    row = {"repo": item.repo, "commit": commit, "tag": item.tag, "what": item.what, "step": item.step}
    rows = [*delivered(run), {**row, "learned": item.learned}]
    write_text(run / NOTES, json.dumps({"delivered": rows}, indent=2) + "\n")
    shutil.rmtree(run / OUTBOX / item.name)


def is_known(run: Path, facts: dict[str, Any], what: str, repo: str) -> bool:
    """Whether this very model waits or was delivered: after an interruption the same steps come again."""
    keys = {"what": what, "step": facts["step"], "learned": facts["learned"], "repo": repo}
    return any(
        all(row.get(key) == value for key, value in keys.items())
        for row in (*delivered(run), *map(asdict, waiting(run)))
    )


@contextmanager
def delivering(run: Path, wait: bool) -> Iterator[bool]:
    """Holds the right to deliver and to drop; gives whether it is ours. One process at a time has it."""
    (run / OUTBOX).mkdir(parents=True, exist_ok=True)
    with (run / OUTBOX / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: the parent that a commit names keeps two from doubling it
            pass
        yield True


def _drop_superseded(run: Path, newest: Item) -> None:
    """Of best models only the newest waits: a node without a route would else keep the weights of all of them."""
    with delivering(run, wait=False) as ours:
        for item in waiting(run) if ours else []:
            if item.what == newest.what and item.repo == newest.repo and item.step < newest.step:
                shutil.rmtree(run / OUTBOX / item.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def body_of(card: str) -> str:
    """A card without its front matter."""
    return re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).strip()
