"""`plan`, `train`, `check`, `replay`."""

import argparse
import json
import os
from pathlib import Path

from clm_dist import recipe
from clm_dist.commands.common import name_deepspeed, quiet_libraries, refuse_launcher, settled
from clm_dist.watch.watch import Watch


def plan(args: argparse.Namespace) -> None:
    """What a run takes, before there is one."""
    refuse_launcher("plan")
    config = recipe.load(args.recipe, args.overrides)
    from clm_dist.planning.planner import Cluster, check_cluster

    cluster = Cluster(args.gpus, args.gpu_memory, args.nodes, args.cpu_memory, args.tflops)
    check_cluster(cluster, config.train.global_batch_size)
    quiet_libraries()
    from clm_dist.planning.plan import plan_run
    from clm_dist.planning.table import text_of

    outlook = plan_run(config, cluster, args.recipe, args.overrides)
    print(json.dumps(outlook.as_json(), indent=2) if args.json else text_of(outlook))


def train(args: argparse.Namespace) -> None:
    """Trains on the prepared blocks, or goes on with that."""
    watch = Watch()
    if not args.dry_run:
        watch.start()
    config = recipe.load(args.recipe, args.overrides)
    name_deepspeed(args)
    from clm_dist.training.gate import admit

    opened = admit(config, args.overwrite)
    quiet_libraries()
    config = settled(config)
    if args.dry_run:
        from clm_dist.training.job import open_job
        from clm_dist.training.publishing import check_hub

        job = open_job(config, args.overwrite, opened=opened)
        check_hub(config, args.overwrite)
        print("\n".join([str(job.plan), *job.sharding.lines()]))
    else:
        from clm_dist.training.train import train as train_model

        train_model(config, args.overwrite, watch, opened)


def check(args: argparse.Namespace) -> None:
    """Whether this launch learns what one plain process would."""
    config = recipe.load(args.recipe, args.overrides)
    name_deepspeed(args)
    from clm_dist.training.gate import admit

    opened = admit(config, overwrite=False, run=False)
    quiet_libraries()
    config = settled(config)
    from clm_dist.training.check import check as check_launch

    lines = check_launch(config, opened)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)


def replay(args: argparse.Namespace) -> None:
    """An offending step again, in one process."""
    refuse_launcher("replay")
    quiet_libraries()
    from clm_dist.training.replay import replay as replay_step

    print("\n".join(replay_step(Path(args.run), args.step)))
