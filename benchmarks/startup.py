"""How long commands take to begin: help, refusals, and the demo from its command to its first step.

    python benchmarks/startup.py [--repeats R] [--against FOLDER] [--output FILE]

The real commands, each in a process of its own; the demo by the launch line of launch/demo.sh, with two processes.
--against: another checkout of this repository (`git worktree add FOLDER COMMIT`), measured in turns with this one.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, cell, facts

PATIENCE = 240  # seconds for a command
DEMO = "recipes/demo.yaml"
# name -> what is measured: yardsticks as Python has them, and commands in the folder of a checkout
YARDSTICKS = {"`python -c pass`": ["-c", "pass"], '`python -c "import torch"`': ["-c", "import torch"]}
COMMANDS = {
    "`clm-dist --help`": ["--help"],
    "`clm-dist train --help`": ["train", "--help"],
    "a key that does not exist": ["train", DEMO, "train.max_stepss=3"],
    "two settings that disagree": ["train", DEMO, "train.max_steps=3"],
    "a recipe that does not exist": ["train", "recipes/none.yaml"],
    "data that is not prepared": ["train", DEMO, "data.prepared_dir=nowhere"],
    "a run folder that cannot be one": ["train", DEMO, "run_dir=README.md"],
    "a source that does not exist": ["prepare", DEMO, "data.source=nowhere.jsonl", "data.prepared_dir=nowhere"],
}
# Loaded by every Python process below a command; notes when it began, and each import that the main thread waited for.
CLOCK = """
import _thread, builtins, importlib, os, time
log = os.open(f"{os.environ['STARTUP_LOG']}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(log, f"process {os.environ.get('RANK', 'launcher')} {time.time()}\\n".encode())
main, within = _thread.get_ident(), []
def timed(real):
    def outermost(*arguments, **named):
        if within or _thread.get_ident() != main:
            return real(*arguments, **named)
        within.append(1)
        began = time.time()
        try:
            return real(*arguments, **named)
        finally:
            within.clear()
            ended = time.time()
            if ended - began > 0.0005:
                os.write(log, f"import {began} {ended}\\n".encode())
    return outermost
builtins.__import__ = timed(builtins.__import__)
importlib.import_module = timed(importlib.import_module)
"""
PARTS = {
    "total": "from the command to the first step",
    "launcher": "of it the launcher, until it has started the first process",
    "launcher imports": "imports of the launcher",
    "rank imports": "imports of that process, until the first step",
    "share": "share of imports",
    "cpu": "CPU time of the launcher and both processes until then",
}
NOTES = """\
A cell is median (smallest to largest) of seconds. Wall time from the start of the process to its end; CPU: user and system
time of the process, which other work on the machine disturbs less. All cases took turns in an order drawn for each round,
after one round that is not counted. The demo: the launch line of launch/demo.sh with `accelerate_configs/ddp.yaml` (two
processes) on data that was prepared before; to the time of the first step in ledger.jsonl, an evaluation before it
included. Imports: the time inside outermost import statements and calls of `importlib.import_module` on the main thread,
lazy ones too, noted by a sitecustomize.py in each process; share: launcher and process together, of the total. What the
interpreter itself does before (30 ms) counts as no import.
"""


@dataclass(frozen=True)
class Checkout:
    """A folder with this repository, in which commands run."""

    label: str
    folder: Path

    def environment(self, *paths: Path) -> dict[str, str]:
        """Its package before any that is installed."""
        path = os.pathsep.join(map(str, (*paths, self.folder)))
        return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    checkouts = [Checkout("this", ROOT)]
    shown = f"--repeats {args.repeats}"
    if args.against is not None:
        commit = git_commit(args.against)
        checkouts.insert(0, Checkout(commit, args.against.resolve()))
        shown += f" --against {commit}"
    with tempfile.TemporaryDirectory() as name:
        seconds, starts = measure(checkouts, Path(name), args.repeats)
    text = "# Time to begin\n\n" + commands_table(seconds, checkouts) + "\n" + demo_table(starts, checkouts)
    text += f"\n{facts('benchmarks/startup.py ' + shown)}\n\n{NOTES}"
    print(text)
    if args.output:
        args.output.write_text(text)


def git_commit(folder: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


Seconds = dict[tuple[str, str], list[tuple[float, float]]]  # (case, checkout) -> wall and CPU of each round
Starts = dict[str, list[dict[str, float]]]  # checkout -> the parts of each round


def measure(checkouts: list[Checkout], folder: Path, repeats: int) -> tuple[Seconds, Starts]:
    """All cases by turns, in an order drawn for each round; one round is not counted."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(CLOCK)
    seconds, starts = defaultdict(list), defaultdict(list)
    for one in checkouts:
        (folder / one.label).mkdir()
        timed(["-m", "clm_dist", "prepare", DEMO, *places(folder / one.label)], one, code=0)
    cases = [(name, ["-m", "clm_dist", *words], one) for name, words in COMMANDS.items() for one in checkouts]
    cases += [(name, words, checkouts[-1]) for name, words in YARDSTICKS.items()]
    cases += [("demo", [], one) for one in checkouts]
    for number in range(repeats + 1):
        for name, words, one in random.sample(cases, len(cases)):
            if name == "demo":
                parts = first_step(one, folder, folder / f"{one.label}-{number}")
                starts[one.label] += [parts] if number else []
                print(f"round {number}, {one.label}, demo: {parts['total']:.2f} s", flush=True)
            else:
                code = 0 if name in YARDSTICKS or "--help" in words else 2
                figures = timed(words, one, code)
                seconds[name, one.label] += [figures] if number else []
    return seconds, starts


def places(folder: Path) -> list[str]:
    """Settings that keep a run of the demo out of the checkout."""
    return [f"data.prepared_dir={folder / 'prepared'}", f"run_dir={folder / 'run'}"]


def timed(words: list[str], checkout: Checkout, code: int) -> tuple[float, float]:
    """Wall and CPU seconds of `python WORDS` in a checkout; leaves where it ends otherwise than by `code`."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=checkout.folder,
        env=checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        sys.exit(f"python {shlex.join(words)} ended with {process.returncode}, not {code}")
    return seconds, usage.ru_utime + usage.ru_stime


def first_step(checkout: Checkout, folder: Path, run: Path) -> dict[str, float]:
    """The demo is launched as launch/demo.sh does, and ended after its first step; the parts of the time until then."""
    line = re.search(r"^run (accelerate.*)$", (checkout.folder / "launch" / "demo.sh").read_text(), re.MULTILINE)
    program, *words = shlex.split(line[1])
    log = Path(tempfile.mkdtemp(dir=folder))
    settings = [*places(folder / checkout.label), f"run_dir={run}"]
    environment = {**checkout.environment(folder / "site"), "STARTUP_LOG": str(log)}
    began = time.time()
    process = subprocess.Popen(
        [Path(sys.executable).with_name(program), *words, *settings],
        cwd=checkout.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while (ended := step_time(run)) is None:
            if process.poll() is not None or time.time() - began > PATIENCE:
                sys.exit(f"the demo of {checkout.label} took no step (exit code {process.returncode})")
            time.sleep(0.02)
        cpu = sum(map(cpu_seconds, log.iterdir()))
    finally:
        for one in log.iterdir():  # named after their processes
            end_process(int(one.name))
        process.wait()
    return {**parts_of(log, began, ended), "cpu": cpu}


def cpu_seconds(log: Path) -> float:
    """User and system time so far of the process that a log is named after."""
    fields = Path(f"/proc/{log.name}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def end_process(pid: int) -> None:
    """At once; it may have left by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def step_time(run: Path) -> float | None:
    """When the first step was done; None before."""
    path = run / "ledger.jsonl"
    text = path.read_text() if path.is_file() else ""
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return next((row["time"] for row in rows if row["event"] == "step"), None)


def parts_of(log: Path, began: float, ended: float) -> dict[str, float]:
    """Seconds by part, from the notes of the launcher and of rank 0."""
    began_at, imports = {}, {}
    for path in log.iterdir():
        (_, who, at), *rest = [line.split() for line in path.read_text().splitlines()]
        began_at[who] = float(at)
        imports[who] = sum(max(0.0, min(float(end), ended) - float(begin)) for _, begin, end in rest)
    total = ended - began
    return {
        "total": total,
        "launcher": began_at["0"] - began,
        "launcher imports": imports["launcher"],
        "rank imports": imports["0"],
        "share": (imports["launcher"] + imports["0"]) / total,
    }


def commands_table(seconds: Seconds, checkouts: list[Checkout]) -> str:
    """Wall and CPU seconds of each case, by checkout."""
    heads = [f"{one.label}, {what}" for one in checkouts for what in ("wall", "CPU")]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in (*YARDSTICKS, *COMMANDS):
        cells = []
        for one in checkouts:
            found = seconds.get((name, one.label))
            cells += [cell(figures, ".2f") for figures in zip(*found, strict=True)] if found else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def demo_table(starts: Starts, checkouts: list[Checkout]) -> str:
    """The parts of the demo's start, by checkout."""
    lines = [f"| the demo, two processes | {' | '.join(one.label for one in checkouts)} |"]
    lines.append("|---" * (1 + len(checkouts)) + "|")
    for part, meaning in PARTS.items():
        form = ".0%" if part == "share" else ".2f"
        cells = [cell([parts[part] for parts in starts[one.label]], form) for one in checkouts]
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
