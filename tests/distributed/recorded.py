"""The program under test with a notebook: `clm_dist` itself, plus a file per rank of which blocks it trained on.

CLM_DIST_RECORD=FOLDER is where the notes go; CLM_DIST_MUTANT=NAME puts one wrong idiom in the place of ours (mutants.py),
to show that the comparisons would see it.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mutants

from clm_dist.cli import main
from clm_dist.data import prepared

FOLDER = Path(os.environ["CLM_DIST_RECORD"])
FOLDER.mkdir(parents=True, exist_ok=True)


class RecordedBlocks(prepared.Blocks):
    """Blocks that note what was asked of them."""

    def __init__(self, folder):
        super().__init__(folder)
        self.note = (FOLDER / f"{folder.name}-rank{os.environ.get('RANK', '0')}.jsonl").open("w", buffering=1)

    def __getitem__(self, indices):
        self.note.write(json.dumps([int(index) for index in indices]) + "\n")
        return super().__getitem__(indices)


prepared.Blocks = RecordedBlocks
mutants.apply(os.environ.get("CLM_DIST_MUTANT"))
code = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as the real entry point does under a launcher
