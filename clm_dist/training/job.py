"""What a run works on: opened and checked before a process group exists or a weight is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_dist.checkpoint.sameness import data_sha256
from clm_dist.config import Config
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import Manifest
from clm_dist.data.prepared import open_blocks, open_prepared
from clm_dist.data.tokenize import load_tokenizer, token_ids
from clm_dist.engine.make import asked
from clm_dist.ledger.ledger import last_row
from clm_dist.model.build import check_fits, max_positions, model_configuration
from clm_dist.model.generate import prompt_ids
from clm_dist.publish.trackers import check_installed
from clm_dist.training import run_folder
from clm_dist.training.plan import Plan, make_plan
from clm_dist.training.resume import check_changes, check_same_run, choose
from clm_dist.training.runtime import check_launch, launched_world_size


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
    engine: str  # what the launch asks for: replicated, zero, fsdp2
    deepspeed: dict[str, Any] | None  # its settings without any "auto", where the launch asks for it
    overwrite: bool  # whether run_dir may hold a run, to be replaced
    finished: bool  # whether run_dir holds this very run, at its end


def open_job(config: Config, overwrite: bool) -> Job:
    """Refuses everything that can be refused by now; touches nothing."""
    check_launch(config.train.mixed_precision)
    check_changes(config)
    may_resume = config.train.resume != "never"
    named = config.train.resume if config.train.resume not in ("auto", "never") else None
    sources = filter(None, (config.model.name, config.data.tokenizer, named))
    run_folder.check_free(config.run_dir, overwrite, sources, resume=may_resume)
    check_installed(config)
    manifest = open_prepared(config)
    prepared = Path(config.data.prepared_dir)
    tokenizer = load_tokenizer(str(prepared / "tokenizer"))
    built = model_configuration(config.model, token_ids(tokenizer))
    check_fits(built, config.data.block_size, manifest.vocab_size, str(config.model.name or config.model.type))
    for prompt in config.generate.prompts:
        prompt_ids(tokenizer, prompt, config.generate, max_positions(built))
    train_blocks, eval_blocks = (open_blocks(config, manifest, split) for split in ("train", "eval"))
    plan = make_plan(config, len(train_blocks), launched_world_size())
    data = data_sha256(manifest.key, manifest.files)
    if overwrite:
        choose(config, data, reread=False, begin_anew=True)  # a checkpoint that was named has to fit all the same
    finished = may_resume and not overwrite and _goes_on(config, data, plan)
    return Job(
        *(manifest, data, train_blocks, eval_blocks, tokenizer, built, plan),
        *(asked(os.environ), _deepspeed(config, plan), overwrite, finished),
    )


def _goes_on(config: Config, data: str, plan: Plan) -> bool:
    """Whether the run is finished already; UserError where run_dir holds another one."""
    checkpoint = choose(config, data, reread=False).checkpoint
    run = Path(config.run_dir)
    if checkpoint is None or not checkpoint.path.resolve().is_relative_to(run.resolve()):
        check_same_run(config, run)
        return False
    last = last_row(run / "ledger.jsonl") or {}
    return checkpoint.step == plan.max_steps == last.get("step") and last.get("state") == "finished"


def _deepspeed(config: Config, plan: Plan) -> dict[str, Any] | None:
    import json
    import os

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    v = json.loads(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
    v.update(
        train_micro_batch_size_per_gpu=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        train_batch_size=plan.global_batch_size,
        gradient_clipping=config.optim.max_grad_norm or 0.0,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        steps_per_print=10**12,
    )
    if config.train.mixed_precision == "bf16":
        v["bf16"] = {"enabled": True}
        if v["zero_optimization"]["stage"] > 1:
            v["data_types"] = {"grad_accum_dtype": "fp32"}
    return v
