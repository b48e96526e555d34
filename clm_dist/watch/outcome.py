"""How a command ended, for launch scripts: the launcher turns every exit code into 1.

A script sets CLM_DIST_OUTCOME to a file; the processes of the run write their exit code there (docs/recovery.md).
"""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "CLM_DIST_OUTCOME"


def write_outcome(code: int, environment: Mapping[str, str] = os.environ) -> None:
    """Notes `code`, unless another process has already said what went wrong: who fails first is the cause."""
    name = environment.get(VARIABLE)
    if not name:
        return
    with Path(name).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read().strip() in ("", "0"):
            file.truncate(0)
            file.write(f"{code}\n")
