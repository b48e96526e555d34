"""When this start of a run has to be over: what the recipe says, or the end of the Slurm job."""

import os
import subprocess
import time
from collections.abc import Mapping


def time_limit(stop_after: float | None, began: float, environment: Mapping[str, str] = os.environ) -> float:
    """On the clock of time.monotonic(); infinity without a limit. began: when the process did, seconds since 1970."""
    end = began + stop_after if stop_after is not None else slurm_end(environment)
    return time.monotonic() + (end - time.time())


def slurm_end(environment: Mapping[str, str]) -> float:
    """The end of the Slurm job in seconds since 1970; infinity outside of one, or where it has none."""
    if "SLURM_JOB_END_TIME" in environment:  # since Slurm 23.02
        return float(environment["SLURM_JOB_END_TIME"])
    if "SLURM_JOB_ID" not in environment:
        return float("inf")
    command = ["squeue", "--noheader", "--jobs", environment["SLURM_JOB_ID"], "--format", "%e"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):  # no squeue, or "N/A"
        return float("inf")
