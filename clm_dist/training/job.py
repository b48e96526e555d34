"""What a run works on: opened and checked before a process group exists or a weight is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.checkpoint.sameness import data_sha256
from clm_dist.config import Config
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import Manifest
from clm_dist.data.prepared import open_blocks, open_prepared
from clm_dist.data.tokenize import load_tokenizer, token_ids, vocab_size
from clm_dist.ledger.ledger import last_row
from clm_dist.model import lora
from clm_dist.model.configuration import model_configuration
from clm_dist.model.generate import prompt_ids
from clm_dist.model.padding import looks_for_padding, no_padding, padding_id
from clm_dist.model.positions import check_fits, max_positions
from clm_dist.publish.courier import check_installed, destinations
from clm_dist.training import run_folder
from clm_dist.training.plan import Plan, make_plan
from clm_dist.training.resume import check_changes, check_same_run, choose
from clm_dist.training.runtime import check_launch, launched_world_size
from clm_dist.training.sharding import Sharding, sharding


@dataclass(frozen=True)
class Job:
    """Checked, opened, and the same on every rank."""

    manifest: Manifest
    data_sha256: str
    train_blocks: Blocks
    eval_blocks: Blocks
    tokenizer: Any
    model_configuration: Any
    plan: Plan
    sharding: Sharding  # what the launch asks for
    overwrite: bool  # whether run_dir may hold a run, to be replaced
    finished: bool  # whether run_dir holds this very run, at its end


def open_job(config: Config, overwrite: bool, run: bool = True) -> Job:
    """Refuses everything that can be refused by now; touches nothing. run: whether one will be in config.run_dir."""
    check_launch(config.train.mixed_precision)
    check_changes(config)
    if config.model.lora is not None:
        lora.check_installed()
    may_resume = config.train.resume != "never"
    named = config.train.resume if config.train.resume not in ("auto", "never") else None
    sources = filter(None, (config.model.name, config.data.tokenizer, named))
    if run:
        run_folder.check_free(config.run_dir, overwrite, sources, resume=may_resume)
        check_installed(destinations(config))
    manifest = open_prepared(config)
    prepared = Path(config.data.prepared_dir)
    tokenizer = load_tokenizer(str(prepared / "tokenizer"))
    built = model_configuration(config.model, token_ids(tokenizer))
    check_fits(
        built,
        config.data.block_size,
        manifest.vocab_size,
        config.model.called,
        bool(config.model.pad_vocab_to_multiple_of),
    )
    prompts = [
        prompt_ids(tokenizer, prompt, config.generate, max_positions(built)) for prompt in config.generate.prompts
    ]
    train_blocks, eval_blocks = (open_blocks(config, manifest, split) for split in ("train", "eval"))
    if looks_for_padding(built):
        trained = config.model.type is None and not config.model.from_scratch
        check_padding(built, (train_blocks, eval_blocks), prompts, tokenizer, config.model.called, trained)
    plan = make_plan(config, len(train_blocks), launched_world_size())
    sharded = sharding(config, plan, built)
    data = data_sha256(manifest.key, manifest.files)
    if overwrite:
        choose(config, data, reread=False, begin_anew=True)  # a checkpoint that was named has to fit all the same
    finished = run and may_resume and not overwrite and _goes_on(config, data, plan)
    return Job(
        *(manifest, data, train_blocks, eval_blocks, tokenizer, built, plan),
        *(sharded, overwrite, finished),
    )


def check_padding(
    built: Any, splits: tuple[Blocks, ...], prompts: list[list[int]], tokenizer: Any, name: str, trained: bool
) -> None:
    """UserError where blocks or prompts hold the id that the model takes for padding, or where it has none.

    trained: whether the model has weights already.
    """
    found = padding_id(built)
    if found is not None and not any(split.holds(found) for split in splits) and not any(found in p for p in prompts):
        return
    present = np.any([split.ids_present(vocab_size(tokenizer)) for split in splits], axis=0)
    present[[token for prompt in prompts for token in prompt]] = True
    raise no_padding(built, present, tokenizer, splits[0].block_size, name, trained)


def _goes_on(config: Config, data: str, plan: Plan) -> bool:
    """Whether the run is finished already; UserError where run_dir holds another one."""
    checkpoint = choose(config, data, reread=False).checkpoint
    run = Path(config.run_dir)
    if checkpoint is None or not checkpoint.path.resolve().is_relative_to(run.resolve()):
        check_same_run(config, run)
        return False
    last = last_row(run / "ledger.jsonl") or {}
    return checkpoint.step == plan.max_steps == last.get("step") and last.get("state") == "finished"
