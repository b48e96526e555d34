"""The model card: what was trained on what, and the figures that were measured, with how."""

import math
import shlex
from pathlib import Path
from typing import Any

import jinja2

from clm_dist.config import Config
from clm_dist.publish.footprint import energy

TEMPLATES = Path(__file__).parent / "templates"
METRICS = {  # of an evaluation: what the Hub calls it, what people call it
    "eval/perplexity": ("perplexity", "Perplexity"),
    "eval/loss": ("loss", "Loss, nats per token"),
    "eval/bits_per_byte": ("bits_per_byte", "Bits per byte"),
    "eval/accuracy": ("accuracy", "Next-token accuracy"),
}


def model_card(
    config: Config,
    figures: dict[str, Any],
    environment: dict[str, Any],
    prepared: dict[str, Any],
    rows: list[dict[str, Any]],
    base_commit: str | None = None,
) -> str:
    """README.md of an exported folder; curves.png is expected beside it.

    figures: metrics of the evaluation, `step`, `arithmetic`, `parameters`, `tokens_seen`, `engine`, perhaps `adapters` and
    `trained`; `away`: sentences for who loads it without this package. environment: environment.json. prepared:
    `tokenizer`, `hub_ids`, `train` and `eval` counts of the data manifest. rows: of metrics.jsonl. base_commit: that of
    the base model on the Hub.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = ", ".join(_sources(config, prepared["hub_ids"]))
    return templates.get_template("card.md.j2").render(
        config=config,
        metadata=metadata(config, figures, prepared["hub_ids"], source).to_yaml().strip(),
        origin=_origin(config) + (f" at commit `{base_commit}`" if base_commit else ""),
        source=source,
        tokenizer_name=_public(prepared["tokenizer"]),
        counts=prepared,
        figures=figures,
        environment=environment,
        energy=energy(environment["device"], environment["processes"], rows),
        launch=launch_line(environment["processes"], figures["engine"]),
    )


def metadata(config: Config, figures: dict[str, Any], hub_ids: list[str], source: str) -> Any:
    """The front matter, with the figures as a model index: what the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    base = config.model.name if config.model.name and not config.model.from_scratch else None
    on_hub = base is not None and not Path(base).exists()
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_ids[0] if hub_ids else "text",
            dataset_name=source,
            dataset_split=config.data.eval_split or "held out",
            metric_type=kind,
            metric_name=name,
            metric_value=figures[key],
        )
        for key, (kind, name) in METRICS.items()
        if math.isfinite(figures.get(key, math.nan))
    ]
    return ModelCardData(
        language=config.publish.language,
        license=config.publish.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if on_hub else None,
        datasets=hub_ids or None,
        tags=["clm-dist", *(["lora"] if config.model.lora is not None else [])],
        model_name=Path(config.run_dir).name if results else None,
        eval_results=results or None,
    )


def launch_line(processes: int, engine: str) -> str:
    """The command that trains like this. engine: as engines call themselves."""
    if processes == 1 and engine == "one process":
        return "clm-dist train recipe.yaml"
    name = engine.lower().replace("zero-", "zero")  # of accelerate_configs/
    arguments = ["--config_file", f"accelerate_configs/{name}.yaml", "--num_processes", str(processes)]
    return shlex.join(["accelerate", "launch", *arguments, "-m", "clm_dist", "train", "recipe.yaml"])


def public_values(value: Any) -> Any:
    """A recipe's values without the paths of the machine: of an absolute one only the last part. A page is public."""
    if isinstance(value, dict):
        return {key: public_values(one) for key, one in value.items()}
    if isinstance(value, list):
        return [public_values(one) for one in value]
    if isinstance(value, str) and value.startswith("/") and Path(value).name:
        return Path(value).name
    return value


def _sources(config: Config, hub_ids: list[str]) -> list[str]:
    """What the text is called. Paths by their last part only: a card is public."""
    names = [entry.source for entry in config.data.entries()]
    every = [one for name in names for one in ([name] if isinstance(name, str) else name)]
    return [one if one in hub_ids else Path(one).name for one in every]


def _public(name: str) -> str:
    """A Hub id as it is, a path by its last part."""
    return Path(name).name if Path(name).exists() or name.startswith((".", "/")) or name.count("/") > 1 else name


def _origin(config: Config) -> str:
    """Where the weights began. Folders by their last name only: a card is public, a path is not."""
    model = config.model
    if model.type is not None:
        return f"a {model.type} with random weights"
    name = _public(str(model.name))
    return f"the architecture of {name} with random weights" if model.from_scratch else name
