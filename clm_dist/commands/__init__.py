"""What each command does, in terms of the wings: one function each, called as the command is.

A chapter is imported when one of its commands runs: help and a wrong command line wait for none.
"""

import argparse
from collections.abc import Callable
from importlib import import_module

CHAPTERS = {
    "architectures": "architectures",
    "check": "training",
    "data inspect": "data",
    "data verify": "data",
    "evaluate": "results",
    "generate": "results",
    "plan": "training",
    "prepare": "data",
    "push": "pushing",
    "replay": "training",
    "report": "results",
    "status": "cluster",
    "submit": "cluster",
    "sync": "sync",
    "train": "training",
    "verify": "results",
}


def function_of(command: str) -> Callable[[argparse.Namespace], None]:
    """What a command calls."""
    chapter = import_module(f"clm_dist.commands.{CHAPTERS[command]}")
    function: Callable[[argparse.Namespace], None] = getattr(chapter, command.replace(" ", "_"))
    return function
