"""What is wrong with a run: slow steps, so that a test meets it alive; or a rank that is killed while it starts.

CLM_DIST_SLOW names a file: while it exists, a step takes two seconds. CLM_DIST_KILLED is the rank.

On PYTHONPATH, Python imports it by itself.
"""

import importlib.util
import os
import signal
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

KEEPER = "clm_dist.training.keeper"


class Slow(MetaPathFinder):
    """Patches the keeper as soon as it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != KEEPER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            after_step = module.Keeper.after_step

            def slowly(keeper, lr):
                if Path(os.environ["CLM_DIST_SLOW"]).exists():
                    time.sleep(2)
                after_step(keeper, lr)

            module.Keeper.after_step = slowly

        spec.loader.exec_module = exec_module
        return spec


if "CLM_DIST_SLOW" in os.environ:
    sys.meta_path.insert(0, Slow())
if os.environ.get("RANK", "none") == os.environ.get("CLM_DIST_KILLED"):
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGKILL)).start()
