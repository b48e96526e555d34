"""Versions of what a result depends on, and whether it is there."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import clm_dist
from clm_dist.errors import UserError

PACKAGES = (
    *("torch", "accelerate", "transformers", "tokenizers", "tiktoken", "fastokens", "datasets", "evaluate", "numpy"),
    *("pyarrow", "peft"),
)


def versions() -> dict[str, str]:
    """Version of this package, of Python and of each library that touches data or arithmetic."""
    found = {"clm-dist": clm_dist.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def check_peft() -> None:
    """UserError where peft is not there."""
    if find_spec("peft") is None:
        raise UserError(
            "model.lora needs peft, which is not installed; pip install 'clm-dist[lora]', or leave model.lora out"
        )
