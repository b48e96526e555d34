"""`verify`, `evaluate`, `generate`, `report`: what became of a run."""

import argparse
import json
from pathlib import Path
from typing import Any

from clm_dist import hub, recipe
from clm_dist.commands.common import check_output, device, quiet_libraries, refuse_launcher, settled
from clm_dist.config import GenerateConfig
from clm_dist.errors import ConfigError, UserError


def verify(args: argparse.Namespace) -> None:
    """Whether a run did what it says."""
    refuse_launcher("verify")
    from clm_dist.training.verify import verify as verify_run

    print(verify_run(Path(args.run)))


def evaluate(args: argparse.Namespace) -> None:
    """Exact evaluation of any model on the recipe's held-out blocks; one process or many."""
    config = recipe.load(args.recipe, args.overrides)
    from clm_dist.training.gate import admit_evaluation

    check_output(args.output, ".json")
    name = args.model or str(Path(config.run_dir) / "model")
    output = args.output or (None if args.model else str(Path(config.run_dir) / "evaluation.json"))
    opened = admit_evaluation(config, name)
    quiet_libraries()
    config = settled(config)
    from clm_dist.training.evaluate_command import evaluate_model

    evaluate_model(config, name, args.revision, output, opened)


def generate(args: argparse.Namespace) -> None:
    """Continues prompts, streaming to the terminal, or a file of prompts into JSON lines."""
    refuse_launcher("generate")
    prompts = _prompts(args)
    overrides = _sampling(args)
    hub.check_name(args.model, "model.name", "or give a folder with config.json as model.name")
    quiet_libraries()
    from transformers import TextStreamer

    from clm_dist.data.tokenize import load_tokenizer
    from clm_dist.model.build import load_model
    from clm_dist.model.generate import generate as generate_text
    from clm_dist.model.generate import saved_settings

    model: Any = load_model(args.model, revision=args.revision)
    tokenizer = load_tokenizer(args.model, args.revision)
    settings = saved_settings(model, overrides)
    model.to(device())
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
    refuse_launcher("report")
    from clm_dist.publish.report import write_report

    check_output(args.output, ".html")
    path = write_report(Path(args.run), Path(args.output) if args.output else None)
    print(f"report in {path}")


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
    check_output(args.output, "")
    return prompts


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
