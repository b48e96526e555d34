"""Types of the tree's fields: what text in a recipe or on the command line may mean."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator

Count = Annotated[int, Field(ge=1)]
Policy = Literal["stop", "skip", "rewind"]  # what to do about a bad step
Checkpointing = bool | Literal["selective"]  # of activations


def _checkpointing(value: Any) -> Any:
    if isinstance(value, bool) or value == "selective":
        return value
    raise ValueError("needs true, false or selective")


CheckpointingField = Annotated[Checkpointing, PlainValidator(_checkpointing)]


def _seconds(value: Any) -> Any:
    """A duration in words: 30s, 90m, 4h, 2d, or as Slurm writes it (minutes:seconds up to days-hours:minutes:seconds)."""
    if not isinstance(value, str):
        return value
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value):
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    if not (match := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", value)):
        raise ValueError("needs seconds, or a duration such as 90m, 4h or 3:55:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


def _at_home(value: str) -> str:
    """~ means home, in a recipe too; anything else stays as it is written (`Path` would change "./a" and "a//b")."""
    return str(Path(value).expanduser()) if value.startswith("~") else value


def _repository_name(value: str) -> str:
    """owner/name, as the Hub allows it."""
    if len(value) > 96 or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value):
        raise ValueError("needs owner/name, such as someone/my-model: letters, digits, - _ and .")
    return value


RepositoryName = Annotated[str, AfterValidator(_repository_name)]
Location = Annotated[str, AfterValidator(_at_home)]  # a path or Hub id; ~ means home, in a recipe too


Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)
]


def _sources(value: Any) -> str | tuple[str, ...]:
    """One place or several, with ~ for home."""
    if isinstance(value, str):
        return _at_home(value)
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return tuple(map(_at_home, value))
    raise ValueError("needs a path or Hub id, or a list of paths")


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


Sources = Annotated[str | tuple[str, ...], PlainValidator(_sources), PlainSerializer(_plain)]


def numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text. A field's type mends that; a model's own settings have none here."""
    if isinstance(value, dict):
        return {key: numbers(one) for key, one in value.items()}
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value
