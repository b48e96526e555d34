"""One bar for long work: on a terminal only, because batch logs want lines."""

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], label: str, unit: str, visible: bool = True) -> Iterable[T]:
    """The items, with a bar on stderr that vanishes at the end; none where stderr is no terminal or not `visible`."""
    from tqdm import tqdm

    hidden = not visible or not sys.stderr.isatty()
    return tqdm(items, desc=label, unit=f" {unit}", unit_scale=True, disable=hidden, leave=False)
