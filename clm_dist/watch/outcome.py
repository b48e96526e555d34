"""How a command ended, for launch scripts: the launcher turns every exit code into 1.

A script sets CLM_DIST_OUTCOME to a file; the processes of the run write their exit code there (docs/recovery.md).
"""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from clm_dist.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

VARIABLE = "CLM_DIST_OUTCOME"


def is_told(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a process of the run has said how it ended."""
    name = environment.get(VARIABLE)
    return bool(name and Path(name).is_file() and Path(name).read_text(encoding="utf-8").strip())


def write_outcome(code: int, environment: Mapping[str, str] = os.environ) -> int:
    """Notes `code`, unless another process has already said what went wrong: who fails first is the cause.

    Returns what to tell the launcher: 0 of a run that has saved and left, if the script learns that from the file. The
    launcher would show a traceback of its own for anything else.
    """
    name = environment.get(VARIABLE)
    if not name:
        return code
    with Path(name).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read().strip() in ("", "0"):
            file.truncate(0)
            file.write(f"{code}\n")
    saved = code in (EXIT_PREEMPTED, EXIT_INTERRUPTED)
    return 0 if saved and "LOCAL_RANK" in environment else code
