"""What each command does, in terms of the wings. Imports are inside, so that a command loads only what it uses."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clm_dist import recipe
from clm_dist.config import Config, GenerateConfig
from clm_dist.errors import ConfigError, UserError
from clm_dist.watch.watch import Watch

NO_MODEL = "none"  # of a recipe that only prepares


def prepare(args: argparse.Namespace) -> None:
    """Text to blocks. A launcher would make every rank do all of it; --shard and --workers share it."""
    _refuse_launcher("prepare")
    config = recipe.load(args.recipe, args.overrides, absent={"model": {"type": NO_MODEL}, "train": {"epochs": 1}})
    from clm_dist.data.manifest import MANIFEST
    from clm_dist.preparation.prepare import prepare as prepare_data
    from clm_dist.preparation.status import status
    from clm_dist.preparation.work import Shard

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} is no number of processes; give 1 or more")
    shard = Shard.parse(args.shard) if args.shard else Shard()
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


def plan(args: argparse.Namespace) -> None:
    """What a run takes, before there is one."""
    _refuse_launcher("plan")
    config = recipe.load(args.recipe, args.overrides)
    quiet_libraries()
    from clm_dist.planning.plan import plan_run
    from clm_dist.planning.planner import Cluster
    from clm_dist.planning.table import text_of

    cluster = Cluster(args.gpus, args.gpu_memory, args.nodes, args.cpu_memory, args.tflops)
    outlook = plan_run(config, cluster, args.recipe, args.overrides)
    print(json.dumps(outlook.as_json(), indent=2) if args.json else text_of(outlook))


def train(args: argparse.Namespace) -> None:
    """Trains on the prepared blocks, or goes on with that."""
    watch = Watch()
    if not args.dry_run:
        watch.start()
    config = recipe.load(args.recipe, args.overrides)
    quiet_libraries()
    config = _settled(config)
    _name_deepspeed(args)
    from clm_dist.training.job import open_job
    from clm_dist.training.train import train as train_model

    if args.dry_run:
        job = open_job(config, args.overwrite)
        print("\n".join([str(job.plan), *job.sharding.lines()]))
    else:
        train_model(config, args.overwrite, watch)


def check(args: argparse.Namespace) -> None:
    """Whether this launch learns what one plain process would."""
    config = recipe.load(args.recipe, args.overrides)
    quiet_libraries()
    config = _settled(config)
    _name_deepspeed(args)
    from clm_dist.training.check import check as check_launch

    lines = check_launch(config)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)


def replay(args: argparse.Namespace) -> None:
    """An offending step again, in one process."""
    _refuse_launcher("replay")
    quiet_libraries()
    from clm_dist.training.replay import replay as replay_step

    print("\n".join(replay_step(Path(args.run), args.step)))


def verify(args: argparse.Namespace) -> None:
    """Whether a run did what it says."""
    _refuse_launcher("verify")
    from clm_dist.training.verify import verify as verify_run

    print(verify_run(Path(args.run)))


def evaluate(args: argparse.Namespace) -> None:
    """Exact evaluation of any model on the recipe's held-out blocks; one process or many."""
    config = recipe.load(args.recipe, args.overrides)
    quiet_libraries()
    config = _settled(config)
    from clm_dist.training.evaluate_command import evaluate_model

    _check_output(args.output, ".json")
    name = args.model or str(Path(config.run_dir) / "model")
    output = args.output or (None if args.model else str(Path(config.run_dir) / "evaluation.json"))
    evaluate_model(config, name, args.revision, output)


def generate(args: argparse.Namespace) -> None:
    """Continues prompts, streaming to the terminal, or a file of prompts into JSON lines."""
    _refuse_launcher("generate")
    prompts = _prompts(args)
    overrides = _sampling(args)
    quiet_libraries()
    from transformers import TextStreamer

    from clm_dist.data.tokenize import load_tokenizer
    from clm_dist.model.build import load_model
    from clm_dist.model.generate import generate as generate_text
    from clm_dist.model.generate import saved_settings

    model: Any = load_model(args.model, revision=args.revision)
    tokenizer = load_tokenizer(args.model, args.revision)
    settings = saved_settings(model, overrides)
    model.to(_device())
    if args.output is None:
        for number, prompt in enumerate(prompts):
            streamer = TextStreamer(tokenizer, skip_special_tokens=True)
            generate_text(model, tokenizer, prompt, settings, args.seed + number, streamer)
        return
    with Path(args.output).open("x", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            text = generate_text(model, tokenizer, prompt, settings, args.seed + number)
            file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(prompts)} texts in {args.output}")


def report(args: argparse.Namespace) -> None:
    """One HTML page of a run."""
    _refuse_launcher("report")
    from clm_dist.publish.report import write_report

    _check_output(args.output, ".html")
    path = write_report(Path(args.run), Path(args.output) if args.output else None)
    print(f"report in {path}")


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


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        path = Path(args.prompts_file)
        if not path.is_file():
            raise UserError(f"--prompts-file {path} does not exist; give a text file with one prompt a line")
        try:
            prompts += [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts-file {path} is not UTF-8 (byte {error.start}); convert it") from None
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT (as often as you like) or --prompts-file FILE")
    _check_output(args.output, "")
    return prompts


def _refuse_launcher(command: str) -> None:
    """Under a launcher each rank would do all of it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{command} is one process's work; run `clm-dist {command}` without the launcher")


def _check_output(output: str | None, suffix: str) -> None:
    """Refuses a file that exists, or that cannot be written, before any work is done for it."""
    if output is None:
        return
    path = Path(output)
    if path.exists():
        raise UserError(f"--output {output} exists; choose another name or remove it")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}; make it or choose another place")
    if not output.endswith(suffix):
        raise UserError(f"--output {output} does not end in {suffix}; give it that ending")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The generate.* settings given on the command line, checked."""
    values: dict[str, Any] = {}
    problems = [problem for text in args.overrides if (problem := recipe.override(values, text))]
    problems += [
        f"{name} is no setting of generate; write generate.field=value" for name in values if name != "generate"
    ]
    given = values.get("generate", {})
    problems += recipe.problems_of_section(GenerateConfig, "generate", given)
    if problems:
        raise ConfigError(problems)
    return dict(given)


def _check_positions(config: Config) -> None:
    """Refuses a block size beyond the model's positions before anything is tokenised, where the model is at hand."""
    from clm_dist.model.build import check_fits, model_configuration

    try:
        built = model_configuration(config.model, {})
    except ConfigError:
        raise
    except UserError:
        return  # the model need not be reachable while text is prepared; `train` asks again
    check_fits(built, config.data.block_size, 0, str(config.model.name or config.model.type))


def quiet_libraries() -> None:
    """The libraries' own bars and notices stand between our lines and fill batch logs; errors still come."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # a data set without a card is a data set; and that it tries five times is told by the message at the end
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _name_deepspeed(args: argparse.Namespace) -> None:
    """--deepspeed, to where all that asks for a launch's settings looks."""
    if args.deepspeed is not None:
        from clm_dist.planning.deepspeed_launch import OWN_VARIABLE

        os.environ[OWN_VARIABLE] = args.deepspeed


def _settled(config: Config) -> Config:
    """With a precision in the place of auto; says which, once."""
    from clm_dist.training.precision import settle_precision

    settled, line = settle_precision(config)
    if line is not None and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
    return settled


def _device() -> Any:
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
