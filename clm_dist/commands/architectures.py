"""`architectures`: what was proved of each, and what the guide does not say."""

import argparse
import json

from clm_dist.errors import UserError, nearest


def architectures(args: argparse.Namespace) -> None:
    """A table of all, everything of one, JSON, or the tables of docs/architectures.md."""
    from clm_dist.model import matrix
    from clm_dist.model.architectures import BY_TYPE

    types = {name.lower(): row.type for row in BY_TYPE.values() for name in (row.name, row.type)}
    if args.type is not None and args.type.lower() not in types:
        close = nearest(args.type, BY_TYPE)
        close = close if close.startswith("; did") else "; `clm-dist architectures` shows it"
        raise UserError(
            f"{args.type} is no row of the table{close} (what has none is tried by clm-dist train ... "
            f"model.type={args.type}, which refuses what predicts no text, and proves the others causal)"
        )
    if args.json:
        print(json.dumps(matrix.as_json(), indent=2))
    elif args.markdown:
        print(matrix.markdown())
    else:
        print("\n".join(matrix.overview() if args.type is None else matrix.details(types[args.type.lower()])))
