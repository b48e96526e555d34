"""How the architectures are run: what is launched, and what comes back. `python suite.py record` writes it all down.

python tests/architectures/suite.py record      # this environment's transformers; ten minutes or more
python tests/architectures/suite.py page        # docs/architectures.md from what is recorded
"""

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(Path(__file__).parent)]
from conftest import ROOT, execute, launch_command, write_documents  # noqa: E402

from clm_dist.model import matrix, transformers_versions  # noqa: E402
from clm_dist.model.architectures import FOUR, GUIDE, LATER  # noqa: E402

HERE = [row.type for row in (*GUIDE, *LATER) if transformers_versions.MAJOR in row.lives]
# under ZeRO: tied with biases, untied, experts, recurrent, an encoder as decoder, unused weights
KINDS = ("gpt2", "llama", "mixtral", "mamba", "bert", "bart")
RECORDED = HERE  # under ZeRO: all; of 4.57 those that 5 has not, and some of the others
# in CI: every second of the guide's; of 4.57 those that 5 has not
OFTEN = [row.type for row in GUIDE if transformers_versions.MAJOR in row.lives][::2]
if transformers_versions.MAJOR < 5:
    KINDS = ("gpt2", "bart", "transfo-xl")
    OFTEN = [row.type for row in GUIDE if row.lives == FOUR]
    RECORDED = [*OFTEN, "gpt2", "bart", "mixtral"]
PAGE = ROOT / "docs" / "architectures.md"
HOUR = 3600.0
BEGIN, END = "<!-- by: clm-dist architectures --markdown -->", "<!-- end -->"


def prepare_data(folder: Path) -> None:
    """Text that thirty steps learn something of, prepared once for all."""
    from clm_dist import recipe
    from clm_dist.preparation.prepare import prepare

    sys.argv = ["worker.py", str(folder), "ddp"]
    import worker

    write_documents(folder / "texts.jsonl", count=160)
    prepare(recipe.build(worker.values("gpt2", folder / "none")))


def run(folder: Path, kind: str, types: list[str] | tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The cells of these architectures, trained by two processes. kind: ddp, zero2, zero3; ddp+ looks at more."""
    plain = kind.rstrip("+")
    program = [str(Path(__file__).parent / "worker.py"), str(folder), kind, *types]
    done = execute(launch_command(2, program, plain), env={"OMP_NUM_THREADS": "1"}, timeout=HOUR)
    results = folder / f"results-{plain}"
    found: dict[str, dict[str, str]] = {}
    for path in sorted(results.glob("*.json")):
        found.setdefault(path.name.partition(".")[0], {}).update(json.loads(path.read_text()))
    missing = set(types) - set(found)
    assert not missing, f"{sorted(missing)}:\n{done.out[-2000:]}\n{done.err[-6000:]}"
    return found


def one_verdict(cells: dict[str, str]) -> str:
    """yes, or the first reason why not: of a run under ZeRO."""
    wrong = [f"{cell}: {found}" for cell, found in cells.items() if not found.startswith("yes")]
    return f"no: {wrong[0].replace(': no', '')}" if wrong else "yes"


def record() -> None:
    """Everything, written to clm_dist/model/proved/."""
    folder = Path(tempfile.mkdtemp())
    prepare_data(folder)
    rows = run(folder, "ddp+", HERE)
    for kind in ("zero2", "zero3"):
        for type_, cells in run(folder, kind, RECORDED).items():
            rows[type_][kind] = one_verdict(cells)
    versions = {name: version(name) for name in ("transformers", "torch", "accelerate", "deepspeed")}
    path = matrix.FOLDER / f"transformers-{transformers_versions.MAJOR}.json"
    path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


def page() -> None:
    """The tables of docs/architectures.md, from what is recorded."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n{matrix.markdown()}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    {"record": record, "page": page}[sys.argv[1]]()
