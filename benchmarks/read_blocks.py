"""One block at a random index, as training reads it: our memory map against `datasets`, on the same prepared files.

    python benchmarks/read_blocks.py [--prepared FOLDER] [--reads N] [--repeats R] [--output FILE]

Without --prepared the real ELI5 answers are prepared in blocks of 128 and of 1024 (see CLM_DIST_REAL_DATA in
tests/conftest.py). Each way reads in a process of its own, and they take turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import ROOT, cell, facts, real_data

WARM_UP, SEED = 500, 0  # reads before the clock counts; of the indices, the same for each way
OURS, PLAIN, NUMPY = "Blocks(folder)[[i]]", 'load_from_disk(folder)[i]["input_ids"]', 'the same, with_format("numpy")'
FIGURES = {"median, us": ("median", ".1f"), "p99, us": ("p99", ".1f"), "opening, ms": ("opening", ".1f")}
NOTES = f"""\
One read at a time of the `train` split at indices drawn with replacement, the files in the page cache, a process of its
own for each way and repeat; the first {WARM_UP} reads are not counted, the cost of the clock (about 0.1 us) is. Both map
the same file; all ways read the same ids (checked by their sum). A cell is median (smallest to largest) over the repeats.

- `{OURS}`: a (1, T) array of the stored integers.
- `{PLAIN}`: a list of Python integers, the default of `datasets`; with_format("numpy"): an array.
- One index at a time: a list of indices costs `datasets` less for each of them, and ours too.
- opening: without imports.
"""


def read(way: str, folder: str, reads: str) -> None:
    """Reads so many random blocks; prints the time of a read in microseconds, and the sum of the ids."""
    import numpy as np
    from datasets import load_from_disk

    from clm_dist.data.blocks import Blocks

    for path in Path(folder).iterdir():
        path.read_bytes()  # into the page cache
    begin = time.perf_counter()
    blocks = Blocks(Path(folder)) if way == OURS else load_from_disk(folder)
    blocks = blocks.with_format("numpy") if way == NUMPY else blocks
    opening = time.perf_counter() - begin
    one = (lambda i: blocks[[i]]) if way == OURS else (lambda i: blocks[i]["input_ids"])
    taken, total = [], 0
    for i in np.random.default_rng(SEED).integers(len(blocks), size=WARM_UP + int(reads)).tolist():
        begin = time.perf_counter_ns()
        ids = one(i)
        taken.append((time.perf_counter_ns() - begin) / 1e3)
        total += int(np.sum(ids, dtype=np.int64))
    counted = taken[WARM_UP:]
    found = {"median": median(counted), "p99": float(np.percentile(counted, 99)), "opening": 1e3 * opening}
    print(json.dumps({**found, "blocks": len(blocks), "block_size": np.size(ids), "sum": total}))


def execute(*arguments: str | Path) -> str:
    """Runs python with arguments; returns what it printed, or leaves with its complaint."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def prepare(folder: Path, block_size: int) -> Path:
    """The real ELI5 answers in blocks."""
    data, prepared = real_data(), folder / f"prepared-{block_size}"
    source = {"source": str(data / "eli5_category"), "text_column": "answers.text", "append_eos": False}
    source |= {"block_size": block_size, "eval_fraction": 0.2, "prepared_dir": str(prepared)}
    values = {"run_dir": str(folder / "run"), "data": source, "model": {"name": str(data / "distilgpt2")}}
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({**values, "train": {"epochs": 1}}))
    execute("-m", "clm_dist", "prepare", recipe)
    return prepared


def measure(prepared: Path, reads: int, repeats: int) -> str:
    """A table of one prepared folder."""
    found, sums = defaultdict(list), set()
    for way in repeats * (OURS, PLAIN, NUMPY):
        figures = json.loads(execute(__file__, "read", way, prepared / "train", str(reads)))
        print(way, figures, file=sys.stderr)
        sums.add(figures["sum"])
        for name, value in figures.items():
            found[way, name].append(value)
    if len(sums) != 1:
        sys.exit(f"{prepared}: not every way read the same ids")
    table = f"| {figures['blocks']:,} blocks of {figures['block_size']:,} | {' | '.join(FIGURES)} | median / ours |\n"
    table += "|---|" + "---|" * (len(FIGURES) + 1) + "\n"
    for way in (OURS, PLAIN, NUMPY):
        cells = [cell(found[way, name], form) for name, form in FIGURES.values()]
        ratio = median(found[way, "median"]) / median(found[OURS, "median"])
        table += f"| `{way}` | {' | '.join(cells)} | {ratio:.1f} |\n".replace('`the same, with_format("numpy")`', NUMPY)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, metavar="FOLDER", help="a prepared_dir (default: the real ELI5)")
    parser.add_argument("--reads", type=int, default=20_000, metavar="N", help="in each process (20000)")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="processes of each way (3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown: tables, command, versions, hardware")
    args = parser.parse_args()
    if args.reads < 1 or args.repeats < 1:
        parser.error("--reads and --repeats take 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        prepared = [args.prepared.resolve()] if args.prepared else [prepare(Path(folder), size) for size in (128, 1024)]
        tables = "\n".join(measure(one, args.reads, args.repeats) for one in prepared)
    print(tables)
    if args.output:
        given = f"--prepared {args.prepared} " if args.prepared else ""
        told = facts(f"benchmarks/read_blocks.py {given}--reads {args.reads} --repeats {args.repeats}")
        args.output.write_text(f"# Reading one block against datasets\n\n{tables}\n{told}\n\n{NOTES}")


if __name__ == "__main__":
    read(*sys.argv[2:]) if sys.argv[1:2] == ["read"] else main()
