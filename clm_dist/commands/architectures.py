"""`architectures`: what was proved of each, and what the guide does not say."""

import argparse
import json

from clm_dist.errors import UserError, nearest


def architectures(args: argparse.Namespace) -> None:
    """A table of all, everything of one, JSON, or the tables of docs/architectures.md."""
    from clm_dist.model import matrix
    from clm_dist.model.architectures import BY_TYPE

    if args.type is not None and args.type not in BY_TYPE:
        raise UserError(
            f"{args.type} stands not in the table{nearest(args.type, BY_TYPE)} Any causal language model of transformers "
            "can be trained, and is proved causal when it starts"
        )
    if args.json:
        print(json.dumps(matrix.as_json(), indent=2))
    elif args.markdown:
        print(matrix.markdown())
    else:
        print("\n".join(matrix.overview() if args.type is None else matrix.details(args.type)))
