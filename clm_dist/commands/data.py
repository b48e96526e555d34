"""`prepare`, `data inspect`, `data verify`. Imports are inside: a command loads only what it uses."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clm_dist import recipe
from clm_dist.commands.common import quiet_hub, quiet_libraries, refuse_launcher
from clm_dist.config import Config
from clm_dist.errors import ConfigError, UserError

NO_MODEL = "none"  # of a recipe that only prepares


def prepare(args: argparse.Namespace) -> None:
    """Text to blocks. A launcher would make every rank do all of it; --shard and --workers share it."""
    refuse_launcher("prepare")
    config = recipe.load(args.recipe, args.overrides, absent={"model": {"type": NO_MODEL}, "train": {"epochs": 1}})
    from clm_dist.data.manifest import MANIFEST
    from clm_dist.data.source import check_sources
    from clm_dist.preparation.prepare import prepare as prepare_data
    from clm_dist.preparation.status import status
    from clm_dist.preparation.work import Shard

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} is no number of processes; give 1 or more")
    shard = Shard.parse(args.shard) if args.shard else Shard()
    if not args.status:
        quiet_hub()
        check_sources(config.data)
    if not (Path(config.data.prepared_dir) / MANIFEST).exists():  # else there is nothing to do, or a misfit to tell
        quiet_libraries()
        if config.model.type != NO_MODEL:
            _check_positions(config)
    if args.status:
        print(status(config))
    else:
        prepare_data(config, shard, args.workers, args.encoder)


def data_inspect(args: argparse.Namespace) -> None:
    """What prepared data holds."""
    from clm_dist.preparation.inspect import inspect

    with _undamaged(args.folder):
        print(inspect(args.folder, args.split, args.block))


def data_verify(args: argparse.Namespace) -> None:
    """Whether prepared data is what was written."""
    from clm_dist.preparation.verify import verify

    with _undamaged(args.folder):
        print(verify(args.folder))


@contextmanager
def _undamaged(folder: str) -> Iterator[None]:
    """Prepared data of which a part is missing or of another shape is one message."""
    try:
        yield
    except BrokenPipeError:
        raise  # of who reads what we print
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}: {error}); copy it again, or remove the folder and prepare again"
        ) from None


def _check_positions(config: Config) -> None:
    """Refuses a block size beyond the model's positions before anything is tokenised, where the model is at hand."""
    from clm_dist.model.configuration import model_configuration
    from clm_dist.model.positions import check_fits

    try:
        built = model_configuration(config.model, {})
    except ConfigError:
        raise
    except UserError:
        if config.model.name is None:
            raise
        return  # the model need not be reachable while text is prepared; `train` asks again
    check_fits(built, config.data.block_size, 0, config.model.called, bool(config.model.pad_vocab_to_multiple_of))
