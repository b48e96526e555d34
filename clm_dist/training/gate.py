"""What a start is refused for before torch is imported: its launch, its run folder, its data, its arithmetic.

Importing torch and transformers takes seconds; a wrong start should not.
"""

from dataclasses import dataclass
from pathlib import Path

from clm_dist import hub
from clm_dist.checkpoint.sameness import data_sha256
from clm_dist.config import Config
from clm_dist.data.blocks import Blocks
from clm_dist.data.manifest import Manifest
from clm_dist.data.prepared import open_blocks, open_prepared
from clm_dist.errors import UserError
from clm_dist.ledger.ledger import last_row
from clm_dist.publish.courier import check_installed, destinations
from clm_dist.training import run_folder
from clm_dist.training.launch import check_launch, launched_world_size
from clm_dist.training.plan import Plan, make_plan
from clm_dist.training.resume import check_changes, check_same_run, choose
from clm_dist.versions import check_peft

NO_MODEL = ("model.name", "or give a folder with config.json as model.name")


@dataclass(frozen=True)
class Opened:
    """What a start reads, as far as it is known without torch."""

    manifest: Manifest
    data_sha256: str
    train_blocks: Blocks
    eval_blocks: Blocks
    plan: Plan


def admit(config: Config, overwrite: bool, run: bool = True) -> Opened:
    """Refuses what can be refused by now; touches nothing. run: whether one will be in config.run_dir.

    A mixed_precision of auto is taken for whatever would do; `open_job` asks again when it is settled.
    """
    check_launch(config.train.mixed_precision)
    check_changes(config)
    if config.model.lora is not None:
        check_peft()
    may_resume = config.train.resume != "never"
    named = config.train.resume if config.train.resume not in ("auto", "never") else None
    if run:
        sources = filter(None, (config.model.name, config.data.tokenizer, named))
        run_folder.check_free(config.run_dir, overwrite, sources, resume=may_resume)
        check_installed(destinations(config))
    hub.check_name(config.model.name, *NO_MODEL)
    manifest = open_prepared(config)
    data = data_sha256(manifest.key, manifest.files)
    train_blocks, eval_blocks = (open_blocks(config, manifest, split) for split in ("train", "eval"))
    plan = make_plan(config, len(train_blocks), launched_world_size())
    if overwrite:
        choose(config, data, reread=False, begin_anew=True)  # a checkpoint that was named has to fit all the same
    elif run and may_resume:
        is_finished(config, data, plan)
    return Opened(manifest, data, train_blocks, eval_blocks, plan)


def admit_evaluation(config: Config, name: str) -> tuple[Manifest, Blocks]:
    """The same for the evaluation of the model `name`; what it reads."""
    check_launch(config.train.mixed_precision)
    manifest = open_prepared(config)
    blocks = open_blocks(config, manifest, "eval")
    if not len(blocks):
        raise UserError(f"{config.data.prepared_dir} holds no text to evaluate on; prepare with data.eval_fraction=0.2")
    if not Path(name).exists() and name == str(Path(config.run_dir) / "model"):
        raise UserError(f"{name} does not exist; train first, or name a model folder or Hub id by --model")
    hub.check_name(name, *NO_MODEL)
    return manifest, blocks


def is_finished(config: Config, data: str, plan: Plan) -> bool:
    """Whether run_dir holds this very run, at its end; UserError where it holds another one. data: hash of the data."""
    checkpoint = choose(config, data, reread=False).checkpoint
    run = Path(config.run_dir)
    if checkpoint is None or not checkpoint.path.resolve().is_relative_to(run.resolve()):
        check_same_run(config, run)
        return False
    last = last_row(run / "ledger.jsonl") or {}
    return checkpoint.step == plan.max_steps == last.get("step") and last.get("state") == "finished"
