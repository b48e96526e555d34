"""Ranks that are launched once and take one case after another: what every case imports is imported once.

    warm.py FOLDER

Launched as users launch the program. Each rank waits for FOLDER/N.json (tests/launched.py) and forks; the child
becomes the program that the case names, with a process group and an end of its own, and FOLDER/N-RANK.code says how it
ended. Packages are imported beforehand; the program under test is not: each child imports it for itself.
"""

import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from transformers import GPT2LMHeadModel  # noqa: F401

import clm_dist.publish.report
import clm_dist.training.check
import clm_dist.training.train  # noqa: F401  # for the packages that they pull in

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed  # noqa: F401

FOLDER, RANK = Path(sys.argv[1]), os.environ.get("RANK", "0")
PATIENCE = 300  # seconds for one case


def become(case: dict, name: str) -> None:
    """The child's whole life."""
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(FOLDER / f"{name}-{RANK}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    faulthandler.dump_traceback_later(PATIENCE - 20)  # what hangs says where
    os.environ.update(case["env"])
    os.chdir(case["cwd"])
    first, *rest = case["program"]
    code = 0
    try:
        if first == "-m":
            sys.argv = [rest[0], *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
            runpy.run_path(first, run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(child: int, name: str) -> int:
    """The exit code of a child; as by the launcher's agent it is asked to end once another rank has failed."""
    end, asked = time.monotonic() + PATIENCE, False
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if not asked and any(code.read_text() != "0" for code in FOLDER.glob(f"{name}-*.code")):
            os.kill(child, signal.SIGTERM)
            asked, end = True, time.monotonic() + 30
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def main() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "clm_dist"]:
        del sys.modules[name]
    number = 0
    while os.getppid() != 1:  # whoever launched this is there
        path = FOLDER / f"{number}.json"
        if not path.exists():
            time.sleep(0.05)
            continue
        case = json.loads(path.read_text())
        if not case:
            break
        child = os.fork()
        if child == 0:
            become(case, str(number))
        staged = FOLDER / f".{number}-{RANK}.code"
        staged.write_text(str(ended(child, str(number))))
        staged.rename(FOLDER / f"{number}-{RANK}.code")
        number += 1


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
