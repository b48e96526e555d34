"""What differs between the two versions of transformers that are supported, 4.57 and 5, in one place."""

from importlib.metadata import version
from typing import Any

from clm_dist.model.architectures import FOUR, Architecture

MAJOR = int(version("transformers").partition(".")[0])


def elsewhere(given: str, row: Architecture) -> str:
    """What to do about an architecture that lives in the other version only."""
    if row.lives == FOUR:
        extra = f" {row.extra}" if row.extra else ""
        return (
            f"{given} has left transformers 5 (here: {version('transformers')}); {row.name} lives in 4.57: make another "
            f"environment with pip install 'clm-dist' 'transformers==4.57.6'{extra} and start from there (in a clone: "
            "make .venv-legacy/.installed), see docs/architectures.md"
        )
    return f"{given} needs transformers 5 (here: {version('transformers')}); pip install 'transformers>=5'"


def named(name: str) -> Any:
    """A class of transformers by its name."""
    import transformers

    return getattr(transformers, name)


def rope_field() -> str:
    """The setting by which rotary positions are scaled."""
    return "rope_parameters" if MAJOR >= 5 else "rope_scaling"
