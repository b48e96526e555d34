"""The door: `clm-dist prepare | train | evaluate | generate | report`. Imports no torch."""

import argparse
import os
import sys
from collections.abc import Sequence

from clm_dist import __version__
from clm_dist.errors import EXIT_INTERRUPTED, EXIT_MISCONFIGURED, UserError

DESCRIPTION = """Train causal language models on many processes: exact order, exact loss, exact perplexity.

  clm-dist prepare  RECIPE   text to blocks of token ids on disk, once
  clm-dist train    RECIPE   train, evaluate, export; many processes by `accelerate launch ... -m clm_dist train RECIPE`
  clm-dist evaluate RECIPE   exact loss and perplexity of any model on the recipe's held-out text
  clm-dist generate MODEL    text from a model folder or Hub id
  clm-dist report   RUN      one HTML page of a run

`clm-dist COMMAND --help` shows each command's settings."""

INTERRUPTED = {
    "prepare": "nothing was written",
    "train": "the run folder keeps the metrics and models written so far",
    "evaluate": "nothing was written",
    "generate": "texts finished before are kept",
    "report": "nothing was written",
}


def entry_point() -> None:
    """Runs the command and leaves. A launched process leaves without the interpreter's tear-down.

    About one in fifteen two-process Accelerate runs aborted there, after all work was done ("terminate called without
    an active exception"), which made a failed job of a finished one. What counts is closed by the commands themselves.
    """
    code = main(sys.argv[1:])
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code. Bad input is one message and 2, Ctrl-C one line and 130."""
    args = parse(argv)
    from clm_dist import commands

    try:
        getattr(commands, args.command)(args)
    except UserError as error:
        _complain(
            f"clm-dist {args.command}: error: {error}"
            if "\n" not in str(error)
            else f"clm-dist {args.command}:\n{error}"
        )
        return EXIT_MISCONFIGURED
    except KeyboardInterrupt:
        _complain(f"\nclm-dist {args.command}: interrupted; {INTERRUPTED[args.command]}")
        return EXIT_INTERRUPTED
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Overrides (section.field=value) may stand anywhere after the command."""
    parser = argparse.ArgumentParser(
        prog="clm-dist",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"clm-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings = _settings_help() if {"-h", "--help"} & set(argv) else ""

    def command(
        name: str, summary: str, target: str, meaning: str, with_settings: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=settings if with_settings else None, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument(target.lower(), metavar=target, help=meaning)
        if with_settings:
            sub.add_argument("overrides", nargs="*", metavar="section.field=value", help="laid over the recipe")
        return sub

    command("prepare", "text to blocks of token ids on disk", "RECIPE", "YAML recipe")
    sub = command("train", "train, evaluate each epoch, export", "RECIPE", "YAML recipe")
    sub.add_argument("--overwrite", action="store_true", help="replace the run in run_dir, if there is one")
    sub = command(
        "evaluate",
        "exact loss and perplexity on the held-out text",
        "RECIPE",
        "YAML recipe, or a run's config.yaml",
    )
    sub.add_argument("--model", help="model folder or Hub id (default: the recipe's run_dir/model)")
    sub.add_argument("--revision", help="commit or tag of --model on the Hub (default: the newest)")
    sub.add_argument(
        "--output",
        help="JSON file for the figures (default for the run's own model: run_dir/evaluation.json)",
    )
    sub = command("generate", "text from a model", "MODEL", "model folder or Hub id", with_settings=False)
    sub.add_argument("overrides", nargs="*", metavar="generate.field=value", help="e.g. generate.top_k=40")
    sub.add_argument("--revision", help="commit or tag of MODEL on the Hub (default: the newest)")
    sub.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    sub.add_argument("--prompts-file", help="file with one prompt a line")
    sub.add_argument("--output", help="write JSON lines {prompt, text} here instead of the terminal")
    sub.add_argument("--seed", type=int, default=42, help="the same seed gives the same text (default 42)")
    sub = command("report", "one self-contained HTML page of a run", "RUN", "run folder", with_settings=False)
    sub.add_argument("--output", help="HTML file (default: RUN/report.html)")

    args, rest = parser.parse_known_args(argv)
    strangers = [text for text in rest if "=" not in text or text.startswith("-") or not hasattr(args, "overrides")]
    if strangers:
        parser.error(
            f"unknown argument {strangers[0]}; settings are written section.field=value, e.g. data.block_size=256"
        )
    if rest:  # argparse takes positionals in one piece only; these stood behind an option
        args.overrides += rest
    return args


def _settings_help() -> str:
    from clm_dist.recipe import help_text

    return help_text()


def _complain(text: str) -> None:
    """Once a machine: every rank meets the same bad input, and N copies of a message are read by nobody."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
