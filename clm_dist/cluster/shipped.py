"""launch/*.sbatch: batch files to copy and edit, written by what `clm-dist submit` writes with.

python -m clm_dist.cluster.shipped launch      # after a change of the template
"""

import sys
from dataclasses import replace
from pathlib import Path

from clm_dist.cluster.batch import PREEMPTIBLE, Batch, Resources

GPU = Resources(nodes=1, gpus_per_node=8, cpus_per_task=64, time="4:00:00")
DDP_OR_ZERO = "# DDP; ZeRO: accelerate_configs/{}.yaml"
PROCESSES = (
    'PROCESSES_PER_NODE="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"  # one a GPU; without GPUs, say how many'
)
STAGE = 'STAGE="${STAGE:-}"  # data.prepared_dir, to be copied to the local disk of each node and read there'
SETUP = ['export PATH="$PWD/.venv/bin:$PATH"  # your environment; `module load ...` before it, where the site has that']
FOLLOW = "Submit from the root of the repository, with data that is prepared. Settings: below, or in the environment."
OUTCOMES = 'OUTCOMES="${OUTCOMES:-$PWD}"  # where the exit code of a start is noted'


def _settings(config: str, zero: str) -> list[str]:
    return [
        f'CONFIG="${{CONFIG:-accelerate_configs/{config}.yaml}}"  {DDP_OR_ZERO.format(zero)}',
        PROCESSES,
        STAGE,
        OUTCOMES,
    ]


def _train(name: str, resources: Resources, usage: str, notes: list[str], config: str, zero: str) -> Batch:
    return Batch(
        *(resources, usage, resources.directives(f"clm-dist-{name}", "%x-%j.log"), '"$@"'),
        notes=[*notes, FOLLOW], settings=_settings(config, zero), setup=SETUP,
    )  # fmt: skip


def shipped() -> dict[str, str]:
    """Name and text of each file."""
    many = replace(GPU, nodes=2)
    preemptible = replace(many, requeue=PREEMPTIBLE)
    usage = "sbatch launch/{}.sbatch RECIPE [section.field=value ...]"
    single = _train(
        "single", GPU, usage.format("single_node"), ["One node, all its GPUs."], "ddp", "zero2"
    )  # fmt: skip
    multi = _train(
        "multi", many, usage.format("multi_node"), ["Several nodes, all their GPUs."], "multi_node", "zero_multi_node"
    )
    preempted = _train(
        "preemptible", preemptible, usage.format("preemptible"),
        ["Saves when its time or its nodes are taken, and queues itself again; never after a failure. `scancel` ends it."],
        "multi_node", "zero_multi_node",
    )  # fmt: skip
    limit = f'MAX_REQUEUES="${{MAX_REQUEUES:-{PREEMPTIBLE}}}"'
    preempted = replace(preempted, settings=[*preempted.settings, limit])
    sweep = _train(
        "sweep", GPU, "sbatch --array=0-2 launch/sweep.sbatch RECIPE SETTINGS",
        ["A run for each line of the file SETTINGS, e.g.  run_dir=runs/a optim.lr=1e-4"], "ddp", "zero2",
    )  # fmt: skip
    sweep = replace(sweep, directives=GPU.directives("clm-dist-sweep", "%x-%A_%a.log"), recipe='"$1"', sweep='"$2"')
    return {
        "single_node.sbatch": single.text(),
        "multi_node.sbatch": multi.text(),
        "preemptible.sbatch": preempted.text(),
        "sweep.sbatch": sweep.text(),
        "prepare.sbatch": _prepare().text(),
    }


def _prepare() -> Batch:
    cores = Resources(processes_per_node=1, cpus_per_task=16, time="2:00:00")
    directives = cores.directives("clm-dist-prepare", "%x-%A_%a.log", told=False)
    return Batch(
        cores, "sbatch --array=0-7 launch/prepare.sbatch RECIPE [section.field=value ...]",
        directives, '"$@"',
        notes=["Each part of the array tokenises its share; who comes last puts all together.", FOLLOW.split(",")[0] + "."],
        setup=SETUP, prepares=True,
    )  # fmt: skip


if __name__ == "__main__":
    for file_name, text in shipped().items():
        (Path(sys.argv[1]) / file_name).write_text(text, encoding="utf-8")
