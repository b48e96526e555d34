"""What a run works on: opened and checked before a process group exists or a weight is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.config import Config
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import Manifest
from clm_dist.data.tokenize import load_tokenizer, token_ids, vocab_size
from clm_dist.model.configuration import model_configuration
from clm_dist.model.generate import prompt_ids
from clm_dist.model.padding import looks_for_padding, no_padding, padding_id
from clm_dist.model.positions import check_fits, max_positions
from clm_dist.training.gate import Opened, admit, is_finished
from clm_dist.training.launch import check_launch
from clm_dist.training.plan import Plan
from clm_dist.training.precision import check_precision
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


def open_job(config: Config, overwrite: bool, run: bool = True, opened: Opened | None = None) -> Job:
    """Refuses everything that can be refused by now; touches nothing. run: whether one will be in config.run_dir.

    opened: what `admit` has let in already.
    """
    opened = opened or admit(config, overwrite, run)
    check_launch(config.train.mixed_precision)  # which is settled by now
    check_precision(config.train.mixed_precision)
    manifest, plan = opened.manifest, opened.plan
    tokenizer = load_tokenizer(str(Path(config.data.prepared_dir) / "tokenizer"))
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
    if looks_for_padding(built):
        trained = config.model.type is None and not config.model.from_scratch
        splits = (opened.train_blocks, opened.eval_blocks)
        check_padding(built, splits, prompts, tokenizer, config.model.called, trained)
    sharded = sharding(config, plan, built)
    may_resume = config.train.resume != "never"
    finished = run and may_resume and not overwrite and is_finished(config, opened.data_sha256, plan)
    return Job(
        *(manifest, opened.data_sha256, opened.train_blocks, opened.eval_blocks, tokenizer, built, plan),
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
