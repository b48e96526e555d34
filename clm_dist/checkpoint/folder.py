"""A checkpoint on disk: staged, hashed, renamed, and whole from the moment its commit mark stands.

RUN/checkpoints/step-00000500/  manifest.json (every file's SHA-256)  COMMITTED (that of the manifest)  state.json  ...
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_dist.checkpoint import disk

MANIFEST, MARK, STATE, CONFIG = "manifest.json", "COMMITTED", "state.json", "config.yaml"
NAME = re.compile(r"step-(\d{8,})")
# endings of what is not yet a checkpoint, is one until another of its step is whole, is none any more
STAGED, REPLACED, REMOVED = ".partial", ".replaced", ".removed"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A folder that calls itself a checkpoint."""

    path: Path

    @property
    def step(self) -> int:
        found = NAME.fullmatch(_plain(self.path.name))
        return int(found[1]) if found else -1

    def state(self) -> dict[str, Any]:
        """state.json; call `problem` first."""
        state: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        return state

    def files(self) -> list[str]:
        """The names of its files, as the manifest has them."""
        return list(json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))["files"])

    def problem(self, reread: bool = True) -> str | None:
        """Why it cannot be trusted; None if it can. reread: hash the files, too, which takes a second per gigabyte or so."""
        mark, manifest = self.path / MARK, self.path / MANIFEST
        if not self.path.is_dir():
            return "there is no such folder"
        if not mark.is_file():
            return "half-written: it has no commit mark"
        if not manifest.is_file():
            return f"{MANIFEST} is missing"
        try:
            if mark.read_bytes().strip() != disk.sha256(manifest).encode():
                return f"{MANIFEST} is not what was committed (its SHA-256 differs)"
            values = json.loads(manifest.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                return f"format {values['format']}, this version reads {FORMAT}"
            for name, written in values["files"].items():
                if problem := self._problem_of(name, written, reread):
                    return problem
            state = self.state()
            wrong = [key for key in ("step", "cursor", "world_size") if not isinstance(state[key], int)]
            if wrong:
                return f"{STATE}: {wrong[0]} is no number"
            return f"it was renamed: {STATE} is of step {state['step']}" if state["step"] != self.step else None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            return f"damaged ({type(error).__name__}: {error})"

    def _problem_of(self, name: str, written: dict[str, Any], reread: bool) -> str | None:
        path = self.path / name
        if Path(name).name != name:
            return f"{name} is no file of a checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, {written['bytes']:,} were written"
        if reread and disk.sha256(path) != written["sha256"]:
            return f"{name} is damaged: its SHA-256 is not that of the manifest"
        return None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All that call themselves checkpoints, newest first; half-written and replaced ones under their passing names too."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and NAME.fullmatch(_plain(path.name))]
    found = [path for path in found if not path.name.endswith(REMOVED)]
    return sorted(
        map(Checkpoint, found), key=lambda one: (one.step, NAME.fullmatch(one.path.name) is not None), reverse=True
    )


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest that can be trusted; hashes all files of those that it looks at."""
    return next((one for one in checkpoints(folder) if one.problem() is None), None)


def staged_path(folder: Path, step: int) -> Path:
    """Where a checkpoint is made."""
    return folder / f".step-{step:08d}{STAGED}"


def stage(folder: Path, step: int) -> None:
    """An empty folder to write into. On the main process, before the others write."""
    clear(folder)
    disk.make_folder(staged_path(folder, step))


def commit(folder: Path, step: int, files: dict[str, dict[str, Any]], state: dict[str, Any], config: str) -> Checkpoint:
    """Makes a checkpoint of what lies staged. On the main process, after all ranks have written.

    files: what `disk.write` returned, by name. Whatever happens on the way, the folder is a checkpoint only from the last
    line on, and what was one before stays one.
    """
    staged, final = staged_path(folder, step), folder / f"step-{step:08d}"
    files = dict(sorted(files.items()))
    files[STATE] = disk.write(staged / STATE, [to_json(state)])
    files[CONFIG] = disk.write(staged / CONFIG, [config.encode()])
    manifest = disk.write(staged / MANIFEST, [to_json({"format": FORMAT, "step": step, "files": files})])
    disk.sync_folder(staged)
    if final.exists():  # damaged, or of before a rewind: perhaps the only whole one until this one is
        disk.rename(final, folder / f".step-{step:08d}{REPLACED}")
    disk.rename(staged, final)
    disk.write(final / f"{MARK}.partial", [manifest["sha256"].encode("ascii")])
    disk.rename(final / f"{MARK}.partial", final / MARK)
    return Checkpoint(final)


def clear(folder: Path) -> None:
    """Takes away what is no checkpoint any more, and what never became one; one that was not replaced gets its name back."""
    if not folder.is_dir():
        return
    passing = sorted(path for path in folder.iterdir() if path.name.startswith("."))
    for path in passing:
        if path.name.endswith((STAGED, REMOVED)):
            disk.remove(path)
    for path in passing:
        if path.name.endswith(REPLACED):
            final = folder / _plain(path.name)
            if final.exists():
                _take_away(path if (final / MARK).is_file() else final)
            if path.exists():
                disk.rename(path, final)


def set_aside(folder: Path, one: Checkpoint) -> Path:
    """Puts a checkpoint where no start looks for one: it is damaged, or the run has gone another way. Nothing is lost."""
    aside = folder / "set-aside"
    disk.make_folder(aside)
    number = sum(path.name.startswith(one.path.name) for path in aside.iterdir())
    target = aside / f"{one.path.name}-{number}"
    disk.rename(one.path, target)
    return target


def rotate(folder: Path, keep_last: int, keep_every: int | None, keep_best: int) -> None:
    """Takes away what need not be kept. On the main process, after a commit: never before."""
    clear(folder)
    committed = [one for one in checkpoints(folder) if (one.path / MARK).is_file()]
    keep = {one.step for one in committed[:keep_last]}
    keep |= {one.step for one in committed if keep_every and one.step % keep_every == 0}
    if keep_best:
        losses = {one.step: loss for one in committed if (loss := _own_loss(one)) is not None}
        keep |= set(sorted(losses, key=lambda step: losses[step])[:keep_best])
    for one in committed:
        if one.step not in keep:
            _take_away(one.path)


def _take_away(path: Path) -> None:
    """A checkpoint loses its name first, so that half of one never looks like one."""
    removed = path.with_name(f".{_plain(path.name)}{REMOVED}")
    disk.rename(path, removed)
    disk.remove(removed)


def _own_loss(one: Checkpoint) -> float | None:
    """The evaluation loss at a checkpoint's own step."""
    try:
        state = one.state()
        loss = float(state["evaluation"]["eval/loss"])
        return loss if state["evaluated"] == state["step"] and math.isfinite(loss) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(name: str) -> str:
    return name.removeprefix(".").removesuffix(STAGED).removesuffix(REPLACED).removesuffix(REMOVED)


def to_json(value: Any) -> bytes:
    """As all JSON of a checkpoint is written."""
    return (json.dumps(value, indent=1) + "\n").encode()
