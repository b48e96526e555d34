"""RUN/slurm/: all that a waiting job will read, copied, so that no later edit can change it; and the job's number."""

import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clm_dist import recipe
from clm_dist.cluster import slurm
from clm_dist.cluster.batch import Batch, Resources, assignments
from clm_dist.cluster.topology import Topology
from clm_dist.config import Config
from clm_dist.errors import UserError
from clm_dist.storage import read_object, write_text

FOLDER = "slurm"  # inside the run folder
RECORD = "job.json"
BATCH_FILE = "job.sbatch"


@dataclass(frozen=True)
class Submission:
    """A job to be. lines: of a sweep, the settings of each of its runs, laid over the recipe."""

    config: Config
    resources: Resources
    topology: Topology | None = None  # None: a job that prepares
    lines: list[str] = field(default_factory=list)
    shards: int | None = None  # of a job that prepares
    setup: list[str] = field(default_factory=list)
    stage: bool = False
    about: dict[str, Any] = field(default_factory=dict)  # command, versions, commit

    @property
    def folder(self) -> Path:
        """Where its files are."""
        folder = Path(self.config.run_dir).absolute() / FOLDER
        return folder / "prepare" if self.shards else folder

    @property
    def log(self) -> str:
        """Its log, with %j, or %A and %a, for numbers that are not known yet."""
        return str(self.folder / ("job-%A_%a.log" if self.lines or self.shards else "job-%j.log"))

    def batch(self) -> Batch:
        """The batch file."""
        name = re.sub(r"[^\w.-]", "-", Path(self.config.run_dir).name) or "run"
        # a log's name with another % than Slurm's own would be filled in by Slurm
        output = str(self.folder).replace("%", "%%") + self.log.removeprefix(str(self.folder))
        directives = [
            *self.resources.directives(name, f'"{output}"' if " " in output else output, told=self.shards is None),
            f"--chdir={Path.cwd()}",
        ]
        count = self.shards or len(self.lines)
        if count:
            directives.insert(0, f"--array=0-{count - 1}")
        own_recipe = shlex.quote(str(self.folder / "recipe.yaml"))
        return Batch(
            resources=self.resources,
            usage=f"sbatch {self.folder / BATCH_FILE}     (written by `clm-dist submit`)",
            directives=directives,
            arguments='"$@"' if self.lines else own_recipe,
            keeps_outcome=True,
            settings=[] if self.topology is None else self._settings(self.topology),
            setup=[*self.setup, f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:\"$PATH\""],
            recipe=own_recipe,
            sweep=shlex.quote(str(self.folder / "array.txt")) if self.lines else None,
            prepares=self.shards is not None,
        )  # fmt: skip

    def _settings(self, topology: Topology) -> list[str]:
        stage = str(Path(self.config.data.prepared_dir).absolute()) if self.stage else None
        return assignments(self.resources, str(self.folder / f"{topology.name}.yaml"), stage, str(self.folder))

    def write(self) -> Path:
        """All of it, the batch file last; its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {"recipe.yaml": recipe.dump(self.config), "about.json": json.dumps(self.about, indent=2) + "\n"}
        if self.lines:
            files["array.txt"] = "".join(f"{line}\n" for line in self.lines)
        if self.topology is not None:
            resources = self.resources
            files |= self.topology.at(self.folder, resources.nodes, resources.world_size).files()
        for name, text in {**files, BATCH_FILE: self.batch().text()}.items():
            write_text(self.folder / name, text)
        return self.folder / BATCH_FILE

    def submit(self) -> str:
        """Writes and submits it; the job's id. UserError where Slurm would not take it: then nothing is written."""
        if not slurm.here():
            raise UserError("there is no sbatch here; submit from a login node of the cluster, or look with --dry-run")
        record = read_record(self.folder)
        if record and slurm.job(record["job"]).get("JobState") in slurm.IN_QUEUE:
            raise UserError(
                f"job {record['job']} of {self.config.run_dir} is in the queue and reads {self.folder}; `scancel "
                f"{record['job']}` first, or set another run_dir"
            )
        slurm.test(self.batch().text())
        job = slurm.submit(self.write())
        write_text(self.folder / RECORD, json.dumps({"job": job, "runs": len(self.lines)}) + "\n")
        return job


def read_record(folder: Path) -> dict[str, Any] | None:
    """Which job was submitted from a folder; None where none was."""
    values = read_object(folder / RECORD)
    return values if "job" in values else None
