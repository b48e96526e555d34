"""Batch files: what a job asks of Slurm, checked, and written from one template, which launch/ is written from too. Pure."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")  # as Slurm takes it: 90, 90:00, 4:00:00, 1-0, 1-12:00:00
MEMORY = re.compile(r"\d+[KMGT]?")
NAME = re.compile(r"[\w.+,@/-]+")
TOLD_BEFORE = 120  # seconds before the limit at which a run is told to save
PREEMPTIBLE = 100  # times that a job queues itself again, where no number was given
SHELL_SAFE = re.compile(r"[\w.,:=+@/\[\]-]+")  # what stands unquoted in a line of settings


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for."""

    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None  # None: one for each GPU
    time: str = "4:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    signal: int = TOLD_BEFORE
    requeue: int | None = None  # how often the job may queue itself again; None: it never does

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        """Processes of all nodes together."""
        return self.nodes * self.processes

    def problems(self) -> list[str]:
        """Everything that is wrong with it, each with its remedy."""
        found = []
        for option, value, least in (
            ("nodes", self.nodes, 1), ("gpus-per-node", self.gpus_per_node, 0), ("cpus-per-task", self.cpus_per_task, 1),
            ("processes-per-node", self.processes_per_node, 1), ("signal", self.signal, 1), ("requeue", self.requeue, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                found.append(f"--{option} {value} is too small; give {least} or more")
        if self.gpus_per_node == 0 and self.processes_per_node is None:
            found.append(
                "how many processes? Give --gpus-per-node G, or, on nodes without GPUs, --processes-per-node P"
            )
        if self.gpus_per_node > 0 and self.processes_per_node not in (None, self.gpus_per_node):
            found.append(
                f"--processes-per-node {self.processes_per_node} but --gpus-per-node {self.gpus_per_node}: each GPU has one "
                "process; leave --processes-per-node out"
            )
        limit = seconds(self.time)
        if not limit:
            found.append(f"--time {self.time} is no time; write H:MM:SS, e.g. 4:00:00, or D-HH:MM:SS")
        elif self.signal >= limit:
            found.append(f"--signal {self.signal} is not before --time {self.time} ({limit} s); lower it")
        if self.mem is not None and not MEMORY.fullmatch(self.mem):
            found.append(f"--mem {self.mem} is no size; write e.g. 200G (of each node; 0: all of it)")
        for option in ("partition", "account", "qos"):
            value = getattr(self, option)
            if value is not None and not NAME.fullmatch(value):
                found.append(f"--{option} {value!r} is no name that Slurm has; see `sinfo` and `sacctmgr show assoc`")
        return found

    def directives(self, name: str, output: str, told: bool = True) -> list[str]:
        """The lines after `#SBATCH`. output: the log, with Slurm's %j or %A_%a. told: whether before the time limit."""
        asked: dict[str, Any] = {
            "job-name": name,
            "nodes": self.nodes,
            "ntasks-per-node": 1,  # the launcher, which starts the processes of its node
            "gpus-per-node": self.gpus_per_node or None,
            # a core for each process at least; with GPUs the site knows better
            "cpus-per-task": self.cpus_per_task or (None if self.gpus_per_node else self.processes),
            "mem": self.mem,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "signal": f"B:USR1@{self.signal}" if told else None,
            "output": output,
            "open-mode": "append",  # the log of a start goes on in that of the one before
        }
        lines = [f"--{option}={value}" for option, value in asked.items() if value is not None]
        # after a failed node, or a preemption, Slurm starts it again: the run goes on where it was saved
        return [*lines, "--requeue"]


@dataclass(frozen=True)
class Batch:
    """A batch file to be."""

    resources: Resources
    usage: str
    directives: list[str]
    arguments: str  # of `clm-dist train` or `prepare`, as the shell reads them
    notes: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    recipe: str = ""  # of a sweep, as the shell reads it
    sweep: str | None = None  # the file with the settings of each of its runs, a line each
    keeps_outcome: bool = False  # for `clm-dist status`
    prepares: bool = False

    def text(self) -> str:
        """The file."""
        environment = Environment(  # a shell script, no HTML
            loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
        )
        template = environment.get_template("prepare.sbatch.j2" if self.prepares else "train.sbatch.j2")
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "resources"}
        return template.render(**values, requeue=self.resources.requeue)


def seconds(text: str) -> int:
    """A limit in Slurm's notation; 0 where it is none."""
    if not TIME.fullmatch(text):
        return 0
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 1:
        hours, minutes, secs = 0, parts[0], 0
    else:
        hours, minutes, secs = ([0, *parts] if len(parts) == 2 else parts)[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs


def assignments(resources: Resources, config: str, stage: str | None, outcomes: str) -> list[str]:
    """The settings of a job that was submitted: nothing of them is left to the environment."""
    lines = [f"CONFIG={shlex.quote(config)}", f"PROCESSES_PER_NODE={resources.processes}"]
    lines += [f"STAGE={shlex.quote(stage or '')}", f"OUTCOMES={shlex.quote(outcomes)}"]
    return lines + ([f"MAX_REQUEUES={resources.requeue}"] if resources.requeue is not None else [])
