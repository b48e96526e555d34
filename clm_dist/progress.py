"""One bar for long work: on a terminal only, because batch logs want lines."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], label: str, unit: str, visible: bool = True) -> Iterable[T]:
    """The items, with a bar on stderr that vanishes at the end; none where stderr is no terminal or not `visible`."""
    from tqdm import tqdm

    return tqdm(items, **_looks(label, unit, visible))


def bar(label: str, unit: str, total: int | None, done: int = 0) -> Any:
    """A bar of whole things that is moved by hand (`update`); a context manager."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, **{**_looks(label, unit, True), "unit_scale": False})


def _looks(label: str, unit: str, visible: bool) -> dict[str, Any]:
    hidden = not visible or not sys.stderr.isatty()
    return {"desc": label, "unit": f" {unit}", "unit_scale": True, "disable": hidden, "leave": False}
