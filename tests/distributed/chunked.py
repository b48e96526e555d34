"""The program under test with chunks of the loss that are small beside a tiny model's batch: there are several in a row.

CLM_DIST_MUTANT=last_chunk_only leaves the gradient of the head's weights to the last of them. CLM_DIST_UNFUSED=1 leaves GELU
as transformers writes it, for which there is no setting.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mutants

from clm_dist.cli import main
from clm_dist.model import build, chunks

chunks.ELEMENTS_ON_CPU = 2**13
cut, made = chunks._chunks, []
chunks._chunks = lambda *of: made.append(of) or cut(*of)
if os.environ.get("CLM_DIST_UNFUSED"):
    build.fuse_gelu = lambda model: None
mutants.apply(os.environ.get("CLM_DIST_MUTANT"))
code = main(sys.argv[1:])
print(f"by chunks: {len(made)} times")
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as the real entry point does under a launcher
