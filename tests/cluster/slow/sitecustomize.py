"""Makes the steps of a run take two seconds while a file exists that CLM_DIST_SLOW names, so that a test meets it alive.

On PYTHONPATH, Python imports it by itself.
"""

import importlib.util
import os
import sys
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
