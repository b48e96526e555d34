"""The door: `clm-dist COMMAND`, one of those in `commands/table.py`. Imports no torch."""

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from clm_dist import __version__
from clm_dist.commands import function_of
from clm_dist.commands.table import COMMANDS, DESCRIPTION, INTERRUPTED
from clm_dist.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_MISCONFIGURED,
    EXIT_PREEMPTED,
    RunEnded,
    RunError,
    UserError,
    nearest,
)
from clm_dist.watch.outcome import write_outcome

PATIENCE = 10  # seconds; a rank's message is out and the launcher has ended the others long before


def entry_point() -> None:
    """Runs the command and leaves. A launched process leaves without the interpreter's tear-down.

    About one in fifteen two-process Accelerate runs aborted there, after all work was done ("terminate called without
    an active exception"), which made a failed job of a finished one. What counts is closed by the commands themselves.
    """
    code = main(sys.argv[1:])
    # an interrupted one too: about one in thirteen ended by the signal all the same, after its message and whatever code
    told = write_outcome(code)
    if "WORLD_SIZE" in os.environ or code in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(told)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code. Bad input is one message and 2, Ctrl-C one line and 130."""
    args = parse(argv)
    _ask_for_large_pages()
    interrupted = _remember_interrupts()
    try:
        function_of(args.command)(args)
        sys.stdout.flush()
    except UserError as error:
        lead = f"clm-dist {args.command}:\n" if "\n" in str(error) else f"clm-dist {args.command}: error: "
        _complain(f"{lead}{error}")
        return EXIT_MISCONFIGURED
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RunEnded as end:
        if end.message is not None:
            print(f"clm-dist {args.command}: {end.message}", file=sys.stderr, flush=True)
        return end.code
    except RunError as error:
        _complain(f"clm-dist {args.command}: failed: {error}")
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        if interrupted:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    f"\nclm-dist {args.command}: interrupted; {INTERRUPTED[args.command]}", file=sys.stderr, flush=True
                )
            return EXIT_INTERRUPTED
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            _complain(f"clm-dist {args.command}: error: {error.filename or 'writing'}: {error.strerror}; mend that")
            return EXIT_FAILED
        raise
    return 0


def _ask_for_large_pages() -> None:
    """Of torch's memory on a CPU, before it gets any (c10/core/impl/alloc_cpu.cpp reads this once).

    What a step frees and gets again goes through the kernel, filled with zeros and page by page: 2 MB at a time instead of 4
    kB (docs/performance.md). Linux gives them where /sys/kernel/mm/transparent_hugepage/enabled is not `never`.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _remember_interrupts() -> list[int]:
    """Ctrl-C raises KeyboardInterrupt as ever, and is noted: a library may turn it into an error of its own, as a
    collective does whose other ranks have left."""
    noted: list[int] = []

    def interrupt(number: int, _: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    return noted


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Overrides (section.field=value) may stand anywhere after the command."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="clm-dist", description=DESCRIPTION, **layout)
    parser.add_argument("--version", action="version", version=f"clm-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked_for_help = argv[0] if {"-h", "--help"} & set(argv) else None  # of this command
    groups = {"": commands}
    for name, (summary, target, meaning, options) in COMMANDS.items():
        group, _, verb = name.rpartition(" ")
        if group not in groups:
            within = commands.add_parser(group, help=f"commands on {group}", **layout)
            groups[group] = within.add_subparsers(dest="verb", required=True, metavar="COMMAND")
        takes_settings = target == "RECIPE"
        epilog = _settings_help() if takes_settings and name == asked_for_help else None
        sub = groups[group].add_parser(verb, help=summary, description=summary, epilog=epilog, **layout)
        if target:
            sub.add_argument(target.lower(), metavar=target, help=meaning)
        if takes_settings:
            sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="laid over the recipe")
        for option, settings in options.items():
            sub.add_argument(option, **settings)
    if "LOCAL_RANK" in os.environ:  # DeepSpeed's launcher says by an argument too what stands in the environment
        argv = [text for text in argv if not text.startswith(("--local_rank=", "--local-rank="))]
    args, rest = parser.parse_known_args(argv)
    if "verb" in args:
        args.command = f"{args.command} {args.verb}"
    strangers = [text for text in rest if "=" not in text or text.startswith("-") or not hasattr(args, "overrides")]
    if strangers:
        name = strangers[0].partition("=")[0]
        known = [option for option in COMMANDS[args.command][3] if option.startswith("--")]
        close = nearest(name, known) if name.startswith("--") else ""
        written = "; settings are written section.field=value, e.g. data.block_size=256"
        parser.error(f"unknown argument {strangers[0]}{close if close.startswith('; did you mean') else written}")
    if rest:  # argparse takes positionals in one piece only; these stood behind an option
        args.overrides += rest
    return args


def _settings_help() -> str:
    from clm_dist.recipe import help_text

    return help_text()


def _complain(text: str) -> None:
    """Says it once on each machine: every rank meets the same bad input, and N copies of a message are read by nobody.

    The launcher ends all ranks when one fails, so the others wait for the first to speak. Who is still there after that
    has a problem of its own, and says so.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
        text = f"[rank {os.environ.get('RANK', '?')}] {text}"
    print(text, file=sys.stderr, flush=True)
