"""`sync`: what waits in a run folder is delivered; the courier of a training process is the same command."""

import argparse
import os
import sys

from clm_dist.commands.common import refuse_launcher, run_of
from clm_dist.errors import EXIT_FAILED, UserError, nearest


def sync(args: argparse.Namespace) -> None:
    """Delivers what waits in a run folder, or says what does; all of it there: 0, else 1."""
    refuse_launcher("sync")
    from clm_dist.publish import courier, delivery

    run, config = run_of(args.run)
    names = courier.destinations(config)
    if args.only is not None:
        if args.only not in names:
            named = nearest(args.only, names) if names else "; it names none"
            raise UserError(f"--only {args.only} is no destination of {run}/config.yaml{named}")
        names = [args.only]
    if args.follow:
        if len(names) != 1:
            raise UserError(
                "--follow is how `train` starts the courier of one destination; leave it out, or name it by --only"
            )
        _leave(delivery.follow(run, names[0], config))
    left = {}
    for name in names:
        courier.check_installed([name])
        destination = courier.make_destination(name, run, config)
        problem = destination.missing() if args.status else delivery.deliver_now(run, name, config, print)
        print(f"{name}: {problem or 'all has arrived'}", flush=True)
        if problem:
            left[name] = problem
    if not names:
        print(f"{run}/config.yaml names no destination; nothing has to leave")
    if left:
        again = f"`clm-dist sync {run}` goes on from there"
        print(f"clm-dist sync: not all has arrived ({', '.join(left)}); {again}", file=sys.stderr, flush=True)
        _leave(EXIT_FAILED)


def _leave(code: int) -> None:
    """At once: a client that hangs would be waited for when the interpreter ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
