"""Which checkpoint a start goes on from, and whether it may: said before anything is launched or loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clm_dist import hub
from clm_dist.checkpoint import folder
from clm_dist.checkpoint.folder import Checkpoint, checkpoints
from clm_dist.checkpoint.sameness import differences, saved_configuration
from clm_dist.config import Config
from clm_dist.errors import ConfigError, UserError, nearest
from clm_dist.recipe import leaves
from clm_dist.training import run_folder


@dataclass(frozen=True)
class Choice:
    """The newest checkpoint that verifies, and why newer ones were passed over."""

    checkpoint: Checkpoint | None
    passed_over: list[tuple[Checkpoint, str]]

    def lines(self) -> list[str]:
        """What the screen says of it."""
        return [f"passed over {one.path.name}: {why}" for one, why in self.passed_over]


def choose(config: Config, data: str, reread: bool, begin_anew: bool = False) -> Choice:
    """Looks at all checkpoints that the recipe may mean, newest first; UserError where it may not go on.

    data: hash of the prepared data. reread: hash the files, too; without, half a look that takes no time. begin_anew: what
    run_dir holds does not count, as it is to be overwritten.
    """
    asked = config.train.resume
    if asked == "never":
        return Choice(None, [])
    candidates = [] if begin_anew else checkpoints(Path(config.run_dir) / "checkpoints")
    if asked != "auto":
        # the same command again goes on from what came of it
        own = [one for one in candidates if _descends(one, asked)]
        named = Checkpoint(Path(asked))
        if not own and (problem := named.problem(reread)):
            raise UserError(
                f"train.resume={asked}: {problem}; name a whole checkpoint, or auto for the newest of run_dir"
            )
        candidates = [*own, named]
    passed_over: list[tuple[Checkpoint, str]] = []
    for one in candidates:
        problem = one.problem(reread)
        if problem is None:
            _check_same(config, one, data, passed_over)
            return Choice(one, passed_over)
        passed_over.append((one, problem))
    return Choice(None, passed_over)


def settle(
    config: Config, job: Any, accelerator: Any, checkpoint: Checkpoint | None, saved: dict[str, Any]
) -> list[str]:
    """Makes the run folder that of the state that was restored; returns what to say. On the main process, which has
    claimed it. saved: the checkpoint's state.json."""
    run = Path(config.run_dir)
    place = run / "checkpoints"
    begins = not run_folder.is_run(config.run_dir) or job.overwrite
    if begins:
        model = config.model
        commit = hub.commit_of(model.name, model.revision, "config.json") if model.name else None
        run_folder.create(config, accelerator, commit, job.overwrite)
    folder.clear(place)
    own = checkpoint is not None and checkpoint.path.parent.resolve() == place.resolve()
    said = run_folder.cut(config.run_dir, saved["files"] if own else {})
    if not begins:
        run_folder.go_on(config, saved.get("step", 0))
    for one in checkpoints(place):
        if one.step > saved.get("step", -1):  # damaged, or of a way that is not gone any further
            said.append(f"set aside: {folder.set_aside(place, one)}")
    return said


def other_base(config: Config, checkpoint: Checkpoint | None, base_sha256: str | None) -> str | None:
    """What to say where a checkpoint's adapters were trained beside other frozen weights than there are now."""
    saved = None if checkpoint is None else checkpoint.state().get("base_sha256")
    if checkpoint is None or saved == base_sha256:
        return None
    model = config.model
    if model.name is None:
        remedy = "take the versions of its state.json, which drew the same ones"
    elif Path(model.name).exists():
        remedy = f"bring {model.name} back to what it was"
    else:
        remedy = "set model.revision to the base_model_commit of environment.json"
    return (
        f"{checkpoint.path} holds adapters beside other frozen weights (sha256 {str(saved)[:12]}) than those of "
        f"{model.called} now ({str(base_sha256)[:12]}); {remedy}, or set another run_dir"
    )


def check_same_run(config: Config, run: Path) -> None:
    """Refuses a run folder that began with another configuration, and was never saved since."""
    path = run / "config.yaml"
    saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(saved, dict):
        return  # killed while it was made: nothing in it yet
    fields = differences(saved, config, data_changed=None)
    if config.train.resume not in ("auto", saved.get("train", {}).get("resume")):
        fields["train.resume"] = f"it did not begin from {config.train.resume}"
    if fields:
        raise UserError(
            f"run_dir={config.run_dir} holds another run ({_listed(fields)}); set another run_dir to keep both, or add "
            "--overwrite to replace it"
        )


def check_changes(config: Config) -> None:
    """Refuses names in train.resume_changes that are no fields."""
    known = [name for name, _ in leaves()]
    wrong = [name for name in config.train.resume_changes if name not in known and not name.startswith("model.config.")]
    if wrong:
        raise ConfigError(
            [f"train.resume_changes names {name}, which is no field{nearest(name, known)}" for name in wrong]
        )


def _descends(one: Checkpoint, asked: str) -> bool:
    return one.problem(reread=False) is None and one.state().get("resumed_from") == asked


def _check_same(config: Config, one: Checkpoint, data: str, passed_over: list[tuple[Checkpoint, str]]) -> None:
    fields = differences(saved_configuration(one), config, data_changed=one.state().get("data") != data)
    meant = config.train.resume_changes
    refused = {name: values for name, values in fields.items() if name not in meant}
    if not refused:
        return
    what = "other data" if all(name.startswith("data.") for name in refused) else "another configuration"
    lines = [
        f"{one.path} is of {what}: {_listed(refused)}; set another run_dir to keep both, --overwrite to begin anew, or, if "
        f"the change is meant, train.resume_changes=[{','.join(refused)}]",
        *(f"passed over {other.path.name}: {why}" for other, why in passed_over),
    ]
    raise ConfigError(lines)


def _listed(fields: dict[str, str]) -> str:
    return ", ".join(f"{name}: {values}" for name, values in fields.items())
