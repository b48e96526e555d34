"""Kills a run again and again, starts it by the same command each time, and compares it with one that was left alone.

    python tests/distributed/crash.py --kills 25 --folder /tmp/crash
    python tests/distributed/crash.py --kills 8 --processes 3 --signals TERM USR1 KILL
    python tests/distributed/crash.py --config zero3 --folder /tmp/crash

A tiny GPT-2 with dropout, in fp32, through `accelerate launch`. Moments are random: in start-up, between steps, in
evaluations, and as soon as a save begins. Ends with 0 only if weights, metrics and ledger are the same to the last bit.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import ROOT, launch_command, prepare_recipe, read_rows, run_command
from safetensors.numpy import load_file

HEARD = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"}  # as launch/local.sh has it
PATIENCE = 300  # seconds
DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}


def prepare(folder: Path, steps: int, **train) -> Path:
    """Prepared data, and a recipe in which much happens: accumulation, evaluations, saves every few steps."""
    model = {"config": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, **DROPOUT}}
    return prepare_recipe(
        folder,
        200,
        model=model,
        optim={"lr": 3e-3, "schedule": "cosine", "warmup_steps": 10},
        train={"max_steps": steps, "micro_batch_size": 2, "log_every": 3, "hang_seconds": 60, **train},
        checkpoint={"save_every": 7, "keep_last": 2},
        evaluate={"every_steps": 20},
    )


class Start:
    """One start of a run."""

    def __init__(
        self,
        recipe: Path,
        run: Path,
        processes: int,
        env: dict[str, str] | None = None,
        script: Path | None = None,
        config: str = "ddp",
        settings: tuple[str, ...] = (),
    ):
        self.run, self.outcome = run, run.with_name(f"{run.name}.outcome")
        self.outcome.unlink(missing_ok=True)
        program = [str(script)] if script else ["-m", "clm_dist"]
        command = launch_command(processes, [*program, "train", str(recipe), f"run_dir={run}", *settings], config)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CLM_DIST_OUTCOME": str(self.outcome),
        }
        self.log = run.with_name(f"{run.name}.log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, **HEARD, **(env or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ranks(self) -> list[int]:
        """The process ids of the ranks: children of the launcher."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [
                int(pid)
                for pid in children.read_text().split()
                if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
        except OSError:
            return []

    def wait(self, timeout: float = PATIENCE) -> int:
        """Until it is over; the code that a launch script sees."""
        self.process.wait(timeout)
        text = self.outcome.read_text().strip() if self.outcome.exists() else ""
        return int(text) if text else self.process.returncode

    def send(self, number: int, target: str) -> None:
        """A signal to the launcher, to one rank, or to all: `tree` is every process of the run."""
        ranks = self.ranks() or [self.process.pid]
        pids = {"launcher": [self.process.pid], "rank": [random.choice(ranks)], "all": ranks}.get(target)
        if pids is None:
            pids = [*ranks, self.process.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def steps(self) -> int:
        """How many rows the ledger has."""
        path = self.run / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, seconds: float = PATIENCE) -> bool:
    """Whether something came to be at all: what is waited for here is no promise of a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


def kill_once(start: Start, number: int, target: str, moment: str | None = None) -> str:
    """Lets a start live for a random while. Returns at which moment it was hit: a random one, too, if none is given."""
    moment = moment or random.choice(["start-up", "steps", "steps", "save", "save"])
    before = start.steps()
    if moment == "start-up":
        time.sleep(random.uniform(0.5, 6))
    else:
        wait_for(lambda: start.steps() > before or start.process.poll() is not None)
        if moment == "save":
            staged = start.run / "checkpoints"
            wait_for(lambda: any(staged.glob(".step-*.partial")) or start.process.poll() is not None)
            time.sleep(random.uniform(0, 0.02))
        else:
            time.sleep(random.uniform(0, 1.0))
    start.send(number, target)
    start.process.wait(PATIENCE)
    if target == "launcher":  # its ranks find out by themselves
        time.sleep(1)
    return moment


def compare(run: Path, reference: Path) -> list[str]:
    """What differs between two runs: weights to the last bit, metrics but for speed, what was learned from."""
    problems = []
    for name in ("model", "model_best"):
        first, second = (load_file(folder / name / "model.safetensors") for folder in (run, reference))
        problems += [f"{name}: {key}" for key in second if first[key].tobytes() != second[key].tobytes()]
    rows = [[_timeless(row) for row in read_rows(folder / "metrics.jsonl")] for folder in (run, reference)]
    if rows[0] != rows[1]:
        problems.append(f"metrics: {len(rows[0])} rows, {len(rows[1])} in the reference")
    consumed = [_last_step(folder)["consumed"] for folder in (run, reference)]
    if consumed[0] != consumed[1]:
        problems.append("ledger: other blocks were learned from")
    verified = run_command("verify", run)
    if verified.code:
        problems.append(f"verify: {verified.err}")
    return problems


def _timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "time" and not key.startswith("perf/")}


def _last_step(run: Path) -> dict:
    return [row for row in read_rows(run / "ledger.jsonl") if row["event"] == "step"][-1]


def crash_test(
    folder: Path, kills: int, processes: int, steps: int, signals: list[str], seed: int, config: str = "ddp"
) -> list[str]:
    """The whole of it; returns what went wrong. config: of accelerate_configs/."""
    random.seed(seed)
    recipe = prepare(folder, steps)
    reference = Start(recipe, folder / "reference", processes, config=config)
    if reference.wait(600) != 0:
        return [f"the reference failed: {reference.log.read_text()[-2000:]}"]
    problems: list[str] = []
    for count in range(kills):
        start = Start(recipe, folder / "run", processes, config=config)
        name, target = random.choice(signals), random.choice(["tree", "rank", "launcher"])
        moment = kill_once(start, getattr(signal, f"SIG{name}"), target)
        newest = max((path.name for path in (folder / "run" / "checkpoints").glob("step-*")), default="no checkpoint")
        print(f"{count + 1:>3}: SIG{name} to {target} in {moment}; {newest}", flush=True)
    last = Start(recipe, folder / "run", processes, config=config)
    if last.wait(600) != 0:
        return [f"the last start failed: {last.log.read_text()[-3000:]}"]
    starts = sum(row["event"] == "start" for row in read_rows(folder / "run" / "ledger.jsonl"))
    print(f"{kills} kills, {starts} starts that trained", flush=True)
    return problems + compare(folder / "run", folder / "reference")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", default="ddp", help="a file of accelerate_configs/, without .yaml")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=["KILL", "TERM", "USR1"])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    options.folder.mkdir(parents=True)
    values = (options.kills, options.processes, options.steps, options.signals, options.seed, options.config)
    found = crash_test(options.folder, *values)
    print("\n".join(found) if found else "the same to the last bit", flush=True)
    sys.exit(bool(found))
