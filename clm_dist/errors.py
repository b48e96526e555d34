"""Errors that a user can mend: one message that says what was given, what is needed, what to do."""

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2  # as argparse and the shell have it: the command was wrong, nothing was done
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved and left when told to; the same command goes on
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shell's convention


class UserError(Exception):
    """Bad input. The command line prints the message without a traceback and exits with 2."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, all at once."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        several = len(self.problems) > 1
        super().__init__("\n".join(f"- {problem}" for problem in self.problems) if several else "".join(self.problems))


class RunError(Exception):
    """The work failed, through no fault of the input. The command line prints the message and exits with 1."""


class RunEnded(Exception):  # noqa: N818 - no error: what there is to say was said, or is said here
    """A run is over before its end: stopped and saved, or failed and named in failure.json.

    The command line prints the message, where this process is the one to say it, and exits with `code`.
    """

    def __init__(self, message: str | None, code: int) -> None:
        self.message, self.code = message, code
        super().__init__(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or a list of the known names."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(names)}" if names else ""
