"""The picture of the README from what speed.py measured: speed and memory beside peers, ours is 1.

python benchmarks/picture.py RESULTS.md [RESULTS.md ...] [--leave-out TITLE ...] --output docs/images/speed.svg
"""

import argparse
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

NAMES = {"minimal": "loop by hand"}  # in the legend; as the tables have it otherwise
SIDES = {"clm-dist": "#1f6feb", "Trainer": "#f0883e", "no-trainer": "#8957e5", "minimal": "#8b949e"}
PANELS = {"tokens/s": "tokens/s, more is better", "memory": "peak memory, less is better"}
Case = dict[str, dict[str, float]]  # side: figure: median, ours is 1


def read(text: str) -> dict[str, Case]:
    """The cases of a results file of speed.py by their titles; those left out that have no peer beside ours."""
    gpu = re.search(r"NVIDIA (\w+)", text)
    where = f"one {gpu[1]}" if gpu else "CPU"
    found = {}
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        case: Case = {}
        for line in body.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            side = cells[0].partition(" (")[0]
            if side in SIDES and len(cells) > 4 and cells[2]:
                case[side] = {"tokens/s": float(cells[2]), "memory": float(cells[4])}
        if "clm-dist" in case and len(case) > 1:
            found[f"{title}\n({where})"] = case
    return found


def draw(cases: dict[str, Case]) -> Figure:
    """Two panels of bars, a group for each case."""
    figure = Figure(figsize=(9, 1.2 + 0.85 * len(cases)), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        for place, (side, color) in enumerate(SIDES.items()):
            heights = [number + 0.2 * place for number in range(len(cases))]
            values = [case.get(side, {}).get(key, 0.0) for case in cases.values()]
            bars = axes.barh(heights, values, height=0.18, color=color, label=NAMES.get(side, side))
            axes.bar_label(bars, [f"{one:.2f}" if one else "" for one in values], padding=2, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.6)
        axes.set_title(title, fontsize=10)
        axes.set_yticks([number + 0.3 for number in range(len(cases))], list(cases), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    axes.invert_yaxis()  # shared: the first case on top in both
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(SIDES), fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.md")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="TITLE", help="cases that were measured anew since"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    cases: dict[str, Case] = {}
    for path in args.results:
        cases |= read(path.read_text())
    cases = {title: case for title, case in cases.items() if title.partition("\n")[0] not in args.leave_out}
    # the same bytes every time, and words as words
    with rc_context({"svg.hashsalt": "clm-dist", "svg.fonttype": "none"}):
        draw(cases).savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
