"""The model card: what was trained on what, and the figures that were measured, with how."""

from pathlib import Path
from typing import Any

import jinja2

from clm_dist.config import Config

TEMPLATES = Path(__file__).parent / "templates"


def model_card(config: Config, figures: dict[str, Any], environment: dict[str, Any], prepared: dict[str, Any]) -> str:
    """README.md of an exported folder.

    figures: metrics of the evaluation, `step`, `arithmetic`, `parameters`. environment: environment.json.
    prepared: `tokenizer`, `train` and `eval` counts of the data manifest.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    base = config.model.name if config.model.name and not config.model.from_scratch else None
    on_hub = base is not None and not Path(base).exists()
    local_source = Path(config.data.source).exists()
    return templates.get_template("card.md.j2").render(
        config=config,
        base_model=base if on_hub else None,
        origin=_origin(config),
        dataset=None if local_source else config.data.source,
        source=Path(config.data.source).name if local_source else config.data.source,
        tokenizer_name=prepared["tokenizer"],
        counts=prepared,
        figures=figures,
        environment=environment,
    )


def _origin(config: Config) -> str:
    """Where the weights began. Folders by their last name only: a card is public, a path is not."""
    model = config.model
    if model.type is not None:
        return f"a {model.type} with random weights"
    name = Path(str(model.name)).name if Path(str(model.name)).exists() else str(model.name)
    return f"the architecture of {name} with random weights" if model.from_scratch else name
