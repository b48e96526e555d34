"""What is asked of Slurm, by its own commands."""

import shutil
import subprocess
from pathlib import Path

from clm_dist.errors import UserError

IN_QUEUE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "STOPPED", "RESIZING")


def here() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def test(text: str) -> None:
    """UserError with Slurm's own words where it would not take a batch file."""
    command = ["sbatch", "--test-only"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        words = " ".join(line.removeprefix("sbatch: ") for line in done.stderr.splitlines())
        raise UserError(f"Slurm refuses the job: {words}; `sinfo` shows partitions and limits; nothing was written")


def submit(batch_file: Path) -> str:
    """The id of the job."""
    command = ["sbatch", "--parsable", str(batch_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise UserError(f"sbatch {batch_file} failed: {' '.join(done.stderr.split())}; mend that and submit again")
    return done.stdout.split(";")[0].strip()  # the name of the cluster may follow


def job(job_id: str) -> dict[str, str]:
    """What Slurm knows of a job: JobState, NodeList, Restarts, ...; nothing where it has forgotten it, or is not here."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.splitlines()
    parts = (part.partition("=") for part in (lines[0].split() if lines and not done.returncode else ()))
    return {name: value for name, equals, value in parts if equals}
