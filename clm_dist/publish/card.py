"""The model card: what was trained on what, and the figures that were measured, with how."""

from pathlib import Path
from typing import Any

import jinja2

from clm_dist.config import Config

TEMPLATES = Path(__file__).parent / "templates"


def model_card(config: Config, figures: dict[str, Any], environment: dict[str, Any], prepared: dict[str, Any]) -> str:
    """README.md of an exported folder.

    figures: metrics of the evaluation, `step`, `arithmetic`, `parameters`. environment: environment.json.
    prepared: `tokenizer`, `hub_ids`, `train` and `eval` counts of the data manifest.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    base = config.model.name if config.model.name and not config.model.from_scratch else None
    on_hub = base is not None and not Path(base).exists()
    return templates.get_template("card.md.j2").render(
        config=config,
        base_model=base if on_hub else None,
        origin=_origin(config),
        datasets=prepared["hub_ids"],
        source=", ".join(_sources(config, prepared["hub_ids"])),
        tokenizer_name=_public(prepared["tokenizer"]),
        counts=prepared,
        figures=figures,
        environment=environment,
    )


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
