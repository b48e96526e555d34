"""A part of the tree, as all of them are."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the tree; unknown keys are refused (and reported with the nearest name)."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,  # until something is validated: half of the time of `--help`, which only reads what fields say
    )
