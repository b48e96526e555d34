"""Recipes: YAML in, a checked `Config` out; every problem at once, unknown keys with the nearest name."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from clm_dist.config import Config, Section
from clm_dist.disagreements import disagreements
from clm_dist.errors import ConfigError, UserError, nearest
from clm_dist.fields import Location, Sources


def load(path: str | Path, overrides: list[str], absent: dict[str, dict[str, Any]] | None = None) -> Config:
    """The recipe at `path` with `section.field=value` overrides laid over it.

    absent: what to assume of sections that the recipe leaves out, for a command that does not read them.
    """
    values = read_yaml(Path(path))
    for name in Config.model_fields:
        if values.get(name, ...) is None and section_at([name]) is not None:
            values[name] = {}  # a section with nothing in it: its defaults
    problems = [problem for text in overrides if (problem := override(values, text))]
    for name, section in (absent or {}).items():
        values.setdefault(name, section)
    return build(values, problems)


def dump(config: Config) -> str:
    """The whole tree as YAML: what `load` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def build(values: dict[str, Any], problems: list[str] | None = None) -> Config:
    """Validates `values` and raises one ConfigError that names every problem, `problems` first."""
    problems = list(problems or [])
    left_out: list[str] = []  # keys with a problem of their own
    while True:
        try:
            config = Config.model_validate(values)
            break
        except ValidationError as error:
            for details in error.errors():  # mended or left out, so that what remains is checked too
                key = _mend(values, details)
                if key not in left_out:  # else it is missing because it was left out
                    problems.append(explain(details))
                if details["type"] != "missing":
                    left_out.append(key)
    # nor is a value that was left out what two fields disagree about
    problems += [text for text in disagreements(config) if not any(key in text for key in left_out)]
    if problems:
        raise ConfigError(problems)
    return config


def problems_of_section(section: type[Section], prefix: str, values: dict[str, Any]) -> list[str]:
    """What is wrong with the values of one section alone."""
    try:
        section.model_validate(values)
    except ValidationError as error:
        return [explain({**details, "loc": (prefix, *details["loc"])}) for details in error.errors()]
    return []


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; a UserError that names the line where it is none."""
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        known = nearest(str(path), beside) if beside else ""
        give = " Give" if known.endswith("?") else "; give"
        raise UserError(f"no recipe at {path}{known}{give} the path of a YAML recipe")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}; correct it there") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not sections of settings; see recipes/demo.yaml")
    return values


def override(values: dict[str, Any], text: str) -> str | None:
    """Sets one `section.field=value` in `values`; returns what is wrong with it, if anything."""
    key, equals, raw = text.partition("=")
    path = key.split(".")
    if not equals or not all(path) or key.startswith("-"):
        return f"{text} is not an override; write section.field=value, e.g. data.block_size=256"
    node = values
    for depth, name in enumerate(path[:-1]):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            above = ".".join(path[: depth + 1])
            return f"{key} cannot be set: {above} is {child!r}, not a section; set {above} itself"
        node = child
    try:
        if raw in ("null", "None"):  # YAML's word, and the one that --help shows
            node[path[-1]] = None
        else:
            node[path[-1]] = raw if _is_text(path, raw) else yaml.safe_load(raw)
    except yaml.YAMLError:
        return f"{key}={raw} is not a YAML value; quote it"
    return None


def explain(details: Any) -> str:
    """One pydantic error as `what was given: what is needed`."""
    path = [str(part) for part in details["loc"]]
    key = ".".join(path)
    if details["type"] == "extra_forbidden":
        parent = section_at(path[:-1])
        prefix = ".".join(path[:-1])
        known = [f"{prefix}.{name}" if prefix else name for name in (parent.model_fields if parent else ())]
        if not nearest(path[-1], [name.split(".")[-1] for name in known]).startswith("; did"):
            # perhaps the right field in the wrong section
            known += [name for name, _ in leaves() if name.split(".")[-1] == path[-1]]
            same = [name for name in known if name.split(".")[-1] == path[-1]]
            return f"unknown key {key}" + (f"; did you mean {same[0]}?" if same else nearest(key, known))
        return f"unknown key {key}{nearest(key, known)}"
    field = field_at(path)
    meaning = f" ({field.description})" if field is not None and field.description else ""
    if details["type"] == "missing":
        return f"{key} is missing; set it{meaning}"
    needed = details["msg"].removeprefix("Value error, ")
    needed = needed[0].lower() + needed[1:]
    return f"{key}={details['input']!r}: {needed}{meaning}"


def leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of the tree by its dotted name, in the order of the file."""
    for name, field in section.model_fields.items():
        below = _section(field.annotation)
        if below is None or field.annotation is not below:  # one that may be left out is a field, too
            yield f"{prefix}{name}", field
        if below is not None:
            yield from leaves(below, f"{prefix}{name}.")


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, perhaps; None where it holds none."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, Section):
            return one if one is annotation or type(None) in get_args(annotation) else None
    return None


def section_at(path: list[str]) -> type[BaseModel] | None:
    """The section class at a dotted path; None where there is none."""
    section: Any = Config
    for name in path:
        if str(name).isdecimal():  # an entry of a list: of what the list holds
            continue
        field = section.model_fields.get(name) if hasattr(section, "model_fields") else None
        section = field.annotation if field is not None else None
        if get_origin(section) is tuple:
            section = get_args(section)[0]
        if (section := _section(section)) is None:
            return None
    return section


def field_at(path: list[str]) -> FieldInfo | None:
    """The field at a dotted path; None where there is none."""
    for end in range(len(path), 0, -1):  # an error inside a list or dict belongs to the field that holds it
        parent = section_at(path[: end - 1])
        if parent is not None and path[end - 1] in parent.model_fields:
            return parent.model_fields[path[end - 1]]
    return None


def flat(config: Config) -> dict[str, Any]:
    """The configuration by dotted names; lists and mappings as JSON text."""
    result = {}
    for name, _ in leaves():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, Section):
            continue  # its fields stand there
        result[name] = json.dumps(value) if isinstance(value, (dict, tuple)) else value
    return result


def help_text() -> str:
    """Every field with its type, range, default and meaning: the lower half of `--help`."""
    lines = ["settings (in the recipe, or as section.field=value on the command line):"]
    for name, field in leaves():
        bounds = [f"{sign} {getattr(rule, attribute)}" for rule in field.metadata
                  for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
                  if getattr(rule, attribute, None) is not None]  # fmt: skip
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {name}  ({', '.join([_type_name(field.annotation), *bounds, default])})")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    parts = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    if get_origin(annotation) is UnionType or "Union" in str(get_origin(annotation)):
        return " | ".join(_type_name(part) for part in parts) + " | null"
    if get_origin(annotation) is tuple:
        return f"list of {_type_name(parts[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type_name(parts[0])
    return " | ".join(str(part) for part in parts)


def _is_text(path: list[str], raw: str) -> bool:
    """Whether the field takes text, so that `model.name=123` stays text and " " stays a space."""
    field = field_at(path)
    if field is not None and field.annotation == Sources | None:
        return not (raw.startswith("[") and raw.endswith("]"))  # else a list; "[ab].txt" is a glob
    return field is not None and field.annotation in (str, str | None, Location | None)


def _mend(values: dict[str, Any], details: Any) -> str:
    """Leaves out what is wrong, or puts something in the place of what is missing; returns its dotted name."""
    path = list(details["loc"])
    while isinstance(path[-1], int):  # an entry of a list: the whole list goes
        path.pop()
    for depth, part in enumerate(path[:-1], 1):
        if section_at(path[:depth]) is None:  # within a list or mapping: the whole field goes
            path = path[:depth]
            break
        values = values[part]
    if details["type"] == "missing":
        field = field_at(path)
        number = field is not None and field.annotation in (int, float)
        values[path[-1]] = {} if section_at(path) else 1 if number else "?"
    else:
        values.pop(path[-1], None)
    return ".".join(map(str, path))
