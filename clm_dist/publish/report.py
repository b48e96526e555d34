"""One self-contained HTML page of a run: curves as inline SVG, samples, configuration, versions. No network to view it."""

import io
import json
from pathlib import Path
from typing import Any

import jinja2

from clm_dist.errors import UserError
from clm_dist.publish.card import TEMPLATES

Curve = tuple[str, list[tuple[int, float]], str]  # label, (step, value), color
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#64748b"


def write_report(run: Path, output: Path | None = None, recipe: str | None = None) -> Path:
    """Writes RUN/report.html (or `output`) from what the run folder holds; returns its path.

    recipe: shown in the place of RUN/config.yaml, and without the command line, on a page that is public.
    """
    rows = read_rows(run / "metrics.jsonl")
    missing = [name for name in ("config.yaml", "environment.json") if not (run / name).is_file()]
    if missing or not rows:
        lacking = missing[0] if missing else "a row in metrics.jsonl"
        raise UserError(f"{run} lacks {lacking}; give the folder of a run that has trained")
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    left_out = {"versions"} if recipe is None else {"versions", "command"}
    page = templates.get_template("report.html.j2").render(
        name=run.resolve().name,
        plots=plots(rows),
        headline=headline(rows),
        evaluations=[row for row in rows if "eval/loss" in row],
        samples=samples_by_prompt(read_rows(run / "samples.jsonl")),
        config=recipe or (run / "config.yaml").read_text(encoding="utf-8"),
        environment={key: value for key, value in environment.items() if key not in left_out},
        versions=environment["versions"],
    )
    output = output or run / "report.html"
    staged = output.with_name(f".{output.name}.partial")
    staged.write_text(page, encoding="utf-8")
    staged.rename(output)
    return output


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines() cuts at U+2028 and U+0085 too
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def headline(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few figures that stand above everything."""
    train = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if "eval/loss" in row]
    found = []
    if evaluations:
        best = min(evaluations, key=lambda row: row["eval/loss"])
        found.append(("perplexity before training", f"{evaluations[0]['eval/perplexity']:,.1f}"))
        found.append(("perplexity after training", f"{evaluations[-1]['eval/perplexity']:,.2f}"))
        found.append(("best perplexity", f"{best['eval/perplexity']:,.2f} (step {best['step']:,})"))
        found.append(("next-token accuracy", f"{evaluations[-1]['eval/accuracy']:.1%}"))
    if train:
        speeds = sorted(row["perf/tokens_per_second"] for row in train)
        found.append(("steps", f"{train[-1]['step']:,}"))
        found.append(("tokens seen", f"{train[-1]['train/tokens_seen']:,}"))
        found.append(("median tokens/s", f"{speeds[len(speeds) // 2]:,.0f}"))
    return found


def samples_by_prompt(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Samples of each prompt, first to last."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["prompt"], []).append(row)
    return grouped


def plots(rows: list[dict[str, Any]]) -> list[str]:
    """Loss, perplexity, learning rate and throughput as SVG elements."""
    train, evaluation = "train", "held-out"
    pictures = [
        svg(
            "Loss, nats per token",
            [(train, curve(rows, "train/loss"), BLUE), (evaluation, curve(rows, "eval/loss"), ORANGE)],
        ),
        svg("Perplexity on held-out text", [(evaluation, curve(rows, "eval/perplexity"), ORANGE)], log=True),
        svg("Learning rate", [(train, curve(rows, "train/lr"), GREY)]),
        svg(
            "Throughput, tokens per second over all processes",
            [(train, curve(rows, "perf/tokens_per_second"), GREY)],
        ),
    ]
    return [picture for picture in pictures if picture]


def curve(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric."""
    return [(row["step"], row[name]) for row in rows if name in row]


def svg(title: str, curves: list[Curve], log: bool = False) -> str:
    """One plot as an <svg> element; empty where no curve has a point."""
    import matplotlib as mpl

    if not any(points for _, points, _ in curves):
        return ""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title}):  # the same run gives the same page
        _figure(title, curves, log).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_picture(rows: list[dict[str, Any]]) -> bytes:
    """The loss of training and of held-out text as PNG, for the card."""
    curves = [("train", curve(rows, "train/loss"), BLUE), ("held-out", curve(rows, "eval/loss"), ORANGE)]
    buffer = io.BytesIO()
    _figure("Loss, nats per token", curves).savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _figure(title: str, curves: list[Curve], log: bool = False) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    drawn = [one for one in curves if one[1]]
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for label, points, color in drawn:
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= 30 else None
        axes.plot(steps, values, color=color, label=label, marker=marker, markersize=3.5, linewidth=1.6)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    if log:
        axes.set_yscale("log")
        for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_formatter(ScalarFormatter())
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False)
    return figure
