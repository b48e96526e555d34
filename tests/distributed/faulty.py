"""The program under test with one thing that goes wrong: `clm_dist` itself, and a fault at a place that is named.

CLM_DIST_FAULT=PLACE:ACTION[:RANK[:TIMES]] does ACTION whenever rank RANK (default: all) comes to PLACE, after so many times
(default 0). Places: preparing, data, micro-step, evaluation, saving, exporting. Actions: pause (half a second, after
touching CLM_DIST_MARKER), raise, hang, stop (SIGSTOP), kill, nan (a loss that is none), flip (a bit of a weight). unsettled
raises too, and is a mutant from the beginning: DDP's buckets as they come.
CLM_DIST_NOTES=FOLDER gets a file per rank of its own hashes of what was consumed, a line a step.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

import clm_dist.publish.export as exporting
import clm_dist.training.evaluate as evaluating
import clm_dist.training.observer as observing
import clm_dist.training.train as training
from clm_dist.checkpoint import tensors
from clm_dist.cli import main
from clm_dist.engine.replicated import Replicated
from clm_dist.model.objective import Objective
from clm_dist.training.agreement import Agreement
from clm_dist.training.logbook import Logbook

PLACE, ACTION, RANK, TIMES, *_ = [*os.environ.get("CLM_DIST_FAULT", "none:none").split(":"), "", ""]
seen = {}


def come_to(place, micro_step=0):
    """Does what was asked for at this place."""
    if place != PLACE or (RANK and os.environ.get("RANK", "0") != RANK):
        return
    seen[place] = seen.get(place, 0) + 1
    if seen[place] <= int(TIMES or 0):
        return
    if ACTION == "pause":
        Path(os.environ["CLM_DIST_MARKER"]).touch()
        time.sleep(0.5)
    elif ACTION in ("raise", "unsettled"):
        raise ValueError(f"injected while {place}")
    elif ACTION == "hang":
        time.sleep(3600)
    elif ACTION == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif ACTION == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def before(module, name, place):
    """Comes to `place` before each call of module.name."""
    original = getattr(module, name)

    def wrapped(*arguments, **named):
        come_to(place)
        return original(*arguments, **named)

    setattr(module, name, wrapped)


def inside_steps(original):
    """Comes to `data` at a step's first micro-batch, and to `micro-step` at the others."""

    def window(*arguments):
        for number, batch in enumerate(original(*arguments)):
            come_to("data" if number == 0 else "micro-step")
            yield batch

    return window


def spoilt(original):
    """A loss that is no number; only steps say what is scored, settling does not."""

    def summed(self, model, inputs, *scored):
        result = original(self, model, inputs, *scored)
        if scored and PLACE == "loss" and RANK in ("", os.environ.get("RANK", "0")):
            seen["loss"] = seen.get("loss", 0) + 1
            if seen["loss"] == int(TIMES or 0) + 1:
                result = result * float("nan")
        return result

    return summed


def flipping(original):
    """After so many updates, one weight of one rank is another."""

    def make_optimizer(model, optim):
        optimizer = original(model, optim)
        update = optimizer.step

        def step(*arguments, **named):
            result = update(*arguments, **named)
            seen["flip"] = seen.get("flip", 0) + 1
            if os.environ.get("RANK", "0") == RANK and seen["flip"] == int(TIMES or 0) + 1:
                with torch.no_grad():
                    next(iter(dict(model.named_parameters()).values())).view(-1)[3] += 1e-3
            return result

        if PLACE == "update":
            optimizer.step = step
        return optimizer

    return make_optimizer


def noted(original):
    """Each rank writes down its own hash of what was consumed."""

    def step(self, state, start, update):
        consumed = original(self, state, start, update)
        with Path(os.environ["CLM_DIST_NOTES"], f"rank-{os.environ.get('RANK', '0')}").open("a") as file:
            file.write(f"{state.step} {update} {consumed}\n")
        return consumed

    return step


if "CLM_DIST_NOTES" in os.environ:
    Logbook.step = noted(Logbook.step)
before(training, "build_model", "preparing")
before(evaluating, "_sums", "evaluation")
before(tensors, "save", "saving")
before(observing, "export", "exporting")
before(exporting, "_set_generation_defaults", "exporting on the main process")
training.window = inside_steps(training.window)
Objective.summed = spoilt(Objective.summed)
training.make_optimizer = flipping(training.make_optimizer)


def local_flag(original):
    """A rank stops when it was told to, whatever the others know: the wrong idiom."""

    def agree(self, *values):
        result = original(self, *values)
        self.stop = self.watch.reason is not None
        return result

    return agree


if ACTION == "unsettled":  # DDP's buckets as they come: other ones in the first step of a start than in the next
    Replicated.settle = lambda *_: None
if ACTION == "local-flag":
    Agreement.read = local_flag(Agreement.read)

if __name__ == "__main__":
    from clm_dist.watch.outcome import write_outcome

    code = main(sys.argv[1:])
    code = write_outcome(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the real entry point does under a launcher
