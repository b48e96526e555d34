"""Versions of what a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

import clm_dist

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
