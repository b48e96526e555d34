"""`submit` and `status`: runs as jobs of a cluster."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clm_dist import recipe
from clm_dist.cluster.batch import PREEMPTIBLE, SHELL_SAFE, Resources
from clm_dist.cluster.submission import Submission
from clm_dist.cluster.topology import Topology, read_topology
from clm_dist.commands.common import quiet_libraries, refuse_launcher
from clm_dist.commands.data import NO_MODEL
from clm_dist.config import Config
from clm_dist.errors import ConfigError, UserError


def submit(args: argparse.Namespace) -> None:
    """A recipe as a Slurm job: checked here, copied, and put into the queue."""
    refuse_launcher("submit")
    submission, runs = _submission(args)
    if submission.topology is not None:
        for config in runs:
            _check(config, submission.topology, submission.resources)
    if args.dry_run:
        print(submission.batch().text(), end="")
        return
    job = submission.submit()
    run = submission.config.run_dir
    print(f"job {job} is in the queue; its files are in {submission.folder}")
    array = submission.lines or submission.shards
    log = submission.log.replace("%A", job).replace("%j", job)
    print(f"  tail -F {log.replace('%a', '*') if array else log}")
    print(f"  clm-dist status {run}" if submission.shards is None else f"  squeue --jobs {job}")
    print(f"  scancel {job}")


def status(args: argparse.Namespace) -> None:
    """How a run is doing."""
    refuse_launcher("status")
    from clm_dist.cluster.status import status as status_of

    found = status_of(Path(args.run))
    for one in found:
        one.outbox = {name: _told(left, one.outbox.get(name)) for name, left in _waiting(Path(one.run)).items()}
    if args.json:
        values = [one.as_json() for one in found]
        print(json.dumps(values if len(values) > 1 else values[0], indent=2))
    else:
        print("\n".join(one.text() for one in found))


def _waiting(run: Path) -> dict[str, str]:
    """What of a run has not arrived, by destination."""
    from clm_dist.publish import courier

    if not (run / "config.yaml").is_file():
        return {}
    config = recipe.load(run / "config.yaml", [])
    made = {name: courier.make_destination(name, run, config) for name in courier.destinations(config)}
    return {name: left for name, one in made.items() if (left := one.missing())}


def _told(left: str, problem: str | None) -> str:
    """What has not arrived, and what came between where something did."""
    return left if problem is None or problem in left else f"{left}; {problem}"


def _submission(args: argparse.Namespace) -> tuple[Submission, list[Config]]:
    """What was asked for, and each run of it; a ConfigError with everything that is wrong with it."""
    problems: list[str] = []
    resources = _resources(args)
    problems += resources.problems()
    if args.prepare is not None:
        problems += _not_for_prepare(args)
    lines = _lines(args.array, problems)
    topology, config, runs = None, None, []
    try:
        topology = read_topology(args.config) if args.prepare is None else None
    except ConfigError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))
    absent: dict[str, dict[str, Any]] = (
        {} if args.prepare is None else {"model": {"type": NO_MODEL}, "train": {"epochs": 1}}
    )
    try:
        config = recipe.load(args.recipe, args.overrides, absent=absent)
        lines = [f"run_dir={Path(config.run_dir).absolute() / str(n)} {line}" for n, line in enumerate(lines)]
        runs = [recipe.load(args.recipe, [*args.overrides, *line.split()]) for line in lines] or [config]
    except ConfigError as error:
        problems += error.problems
    if lines and config is not None and not SHELL_SAFE.fullmatch(str(Path(config.run_dir).absolute())):
        problems.append(
            f"run_dir={config.run_dir}: a sweep needs a folder whose name has no spaces or such; set another"
        )
    if problems:
        raise ConfigError(problems)
    assert config is not None
    submission = Submission(
        config, resources, topology, lines, args.prepare, args.setup, args.stage, _about() if not args.dry_run else {}
    )
    return submission, runs


def _resources(args: argparse.Namespace) -> Resources:
    names = ("nodes", "gpus_per_node", "processes_per_node", "time", "partition", "account", "qos", "cpus_per_task")
    values = {name: getattr(args, name) for name in (*names, "mem", "signal")}
    if args.prepare is not None and values["processes_per_node"] is None:
        values["processes_per_node"] = 1
    requeue = PREEMPTIBLE if args.preemptible and args.requeue is None else args.requeue
    return Resources(**values, requeue=requeue)


def _not_for_prepare(args: argparse.Namespace) -> list[str]:
    found = [] if args.prepare >= 1 else [f"--prepare {args.prepare} is no number of shards; give 1 or more"]
    given = {
        "--nodes": args.nodes != 1, "--gpus-per-node": args.gpus_per_node > 0, "--array": bool(args.array),
        "--stage": args.stage, "--requeue": args.requeue is not None, "--preemptible": args.preemptible,
    }  # fmt: skip
    found += [f"{name} means nothing to --prepare; leave it out" for name, is_given in given.items() if is_given]
    return found


def _lines(given: list[str], problems: list[str]) -> list[str]:
    """The settings of each run of a sweep: every combination of `--array field=value,value`."""
    choices = []
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not all(values.split(",")) or not SHELL_SAFE.fullmatch(text):
            problems.append(f"--array {text} is no list of settings; write section.field=value,value, without spaces")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [" ".join(combination) for combination in itertools.product(*choices)] if choices else []


def _about() -> dict[str, object]:
    from clm_dist.training.run_folder import commit
    from clm_dist.versions import versions

    return {"command": ["clm-dist", *sys.argv[1:]], "commit": commit(), "versions": versions()}


def _check(config: Config, topology: Topology, resources: Resources) -> None:
    """Refuses here what its processes would refuse there, as far as this machine can know."""
    from clm_dist.training.gate import admit

    with _environment(topology.environment(resources.world_size)):
        opened = admit(config, overwrite=False)
        quiet_libraries()
        import torch

        from clm_dist.training.job import open_job
        from clm_dist.training.precision import settle_precision

        if resources.gpus_per_node and not torch.cuda.is_available():  # what its GPUs can do, they will say
            train = config.train.model_copy(update={"mixed_precision": "no"})
            config = config.model_copy(update={"train": train})
        if open_job(settle_precision(config)[0], overwrite=False, opened=opened).finished:
            raise UserError(f"{config.run_dir} is finished; set another run_dir for another run")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """As a launcher sets it, for a while."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
