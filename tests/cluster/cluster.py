"""What cluster tests do: submit as users do, look at a job, wait for something with a generous limit."""

import contextlib
import io
import json
import re
import subprocess
import time
from pathlib import Path

from conftest import read_rows

from clm_dist.cli import main

SCRIPT = Path(__file__).parent / "slurm.sh"
FAULTS = Path(__file__).parent / "faults"
SETUP = ("--setup", "export OMP_NUM_THREADS=1")  # sums in a matrix product depend on the number of threads
NOT_OVER = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


def run(*command, check=True, **options):
    """A command to its end; its output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300, **options)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def command(*arguments):
    """`clm-dist ARGUMENTS`, in this process, which has imported torch already; its output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*map(str, arguments)])
    assert code == 0, out.getvalue()
    return out.getvalue()


def submit(recipe, *arguments):
    """`clm-dist submit`; the id of the job."""
    out = command("submit", recipe, *SETUP, *arguments)
    return re.search(r"^job (\d+) is in the queue", out, re.MULTILINE)[1]


def status(folder):
    """`clm-dist status --json`."""
    return json.loads(command("status", folder, "--json"))


def slow(file):
    """Arguments of `submit` for a run with slow steps, as long as the file exists."""
    file.touch()
    return faulty(f"CLM_DIST_SLOW={file}")


def faulty(fault):
    """Arguments of `submit` for a run with a fault of faults/."""
    return ("--setup", f"export {fault} PYTHONPATH={FAULTS}:${{PYTHONPATH:-}}")


def job(number):
    """What Slurm knows of a job."""
    line = run("scontrol", "--oneliner", "show", "job", number)
    return dict(part.partition("=")[::2] for part in line.split())


def wait_for(condition, what, seconds=300):
    """Waits until something has come to be."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.3)
    return found


def wait_until_over(*numbers):
    """Until jobs have left the queue for good; their states."""
    return [
        wait_for(lambda number=number: (state := job(number)["JobState"]) not in NOT_OVER and state, f"job {number}")
        for number in numbers
    ]


def rows(folder, event=None):
    """The ledger of a run, as far as it is written."""
    path = folder / "ledger.jsonl"
    if not path.exists() or not path.read_bytes().endswith(b"\n"):
        return []
    return [row for row in read_rows(path) if event is None or row["event"] == event]


def steps_of_start(folder, start):
    """How many steps the start with this number (from 0) has done."""
    found = rows(folder)
    begins = [number for number, row in enumerate(found) if row["event"] == "start"]
    return sum(row["event"] == "step" for row in found[begins[start] :]) if len(begins) > start else 0


def log(folder):
    """What jobs of a run said."""
    return "".join(path.read_text() for path in sorted((folder / "slurm").glob("job-*.log")))


def losses(folder):
    """Of every step that was logged, and every evaluation."""
    names = ("step", "train/loss", "eval/loss")
    return [{name: row[name] for name in names if name in row} for row in read_rows(folder / "metrics.jsonl")]
