"""What the benchmarks share: the facts under a table, how figures are written, where the real data lies."""

import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import median

from clm_dist.versions import versions

ROOT = Path(__file__).resolve().parents[1]


def cell(values: Sequence[float], form: str) -> str:
    """Median (smallest to largest)."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def verdict(what: str, ratios: list[float], bound: float) -> str:
    """A line that says whether a bound holds."""
    told = ", ".join(f"{ratio:.2f} {'holds' if ratio <= bound else 'FAILS'}" for ratio in ratios)
    return f"- {what}: at most {bound} wanted: {told}\n"


def table(title: str, head: str, rows: Iterable[list[str]]) -> str:
    """A Markdown table under a title."""
    columns = [cell.strip() for cell in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def facts(command: str) -> str:
    """The command, and when, where and with what it ran."""
    from clm_dist.training.run_folder import commit

    cpu = next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), platform.machine())
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"`python {command}`\n\n{date.today()}; commit {commit()}; {os.cpu_count()} cores, {cpu};\n{used}."


def real_data() -> Path:
    """The folder of the real ELI5 answers and the real GPT-2 tokenizer; leaves with a message where it is not."""
    folder = Path(os.environ.get("CLM_DIST_REAL_DATA", ROOT.parent / "shared" / "data"))
    for needed in (folder / "eli5_category" / "eli5-category-test.json.gz", folder / "distilgpt2" / "tokenizer.json"):
        if not needed.is_file():
            sys.exit(
                f"{needed} is not there; set CLM_DIST_REAL_DATA to the folder that holds eli5_category and distilgpt2"
            )
    return folder
