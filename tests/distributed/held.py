"""The program under test with a witness: what every rank holds right after it has loaded a checkpoint, as files.

CLM_DIST_HELD=FOLDER gets `model-RANK.safetensors` and `optimizer-RANK.safetensors`, as a checkpoint has them.
"""

import os
import sys
from pathlib import Path

from clm_dist.checkpoint import tensors
from clm_dist.cli import main
from clm_dist.engine.engine import Engine
from clm_dist.engine.fsdp import Fsdp
from clm_dist.engine.replicated import Replicated
from clm_dist.engine.zero import Zero

FOLDER = Path(os.environ["CLM_DIST_HELD"])
FOLDER.mkdir(parents=True, exist_ok=True)


def witnessed(kind: type[Engine]) -> None:
    """Writes down what is held after each load."""
    original = kind.load

    def load(self, model, optimizer):
        original(self, model, optimizer)
        for name, held in self.held().items():
            tensors.save(FOLDER / f"{name}-{self.accelerator.process_index}.safetensors", held)

    kind.load = load


for engine in (Zero, Fsdp, Replicated):
    witnessed(engine)
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as the real entry point does under a launcher
