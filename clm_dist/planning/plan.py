"""The plan of a run that has not begun: from a recipe and a cluster to figures and a command."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clm_dist.config import Config
from clm_dist.data.manifest import MANIFEST, Manifest, read_manifest
from clm_dist.data.order import steps_of_epochs
from clm_dist.errors import UserError
from clm_dist.fields import Checkpointing
from clm_dist.model.build import outline
from clm_dist.model.configuration import model_configuration
from clm_dist.model.positions import check_fits
from clm_dist.planning.memory import STRATEGIES, Activations
from clm_dist.planning.planner import Cluster, Row, Task, largest_evaluation, precision_of, recommend, rows
from clm_dist.planning.shapes import hidden_size, shapes
from clm_dist.planning.zero_settings import zero_settings
from clm_dist.progress import progress


@dataclass(frozen=True)
class Outlook:
    """All that is known of a run before it is launched."""

    model: str
    parameters: int
    trained: int  # of them
    mixed_precision: str
    block_size: int
    global_batch_size: int
    tokens_per_step: int
    steps_per_epoch: int | None  # None: nothing is prepared yet
    tokens_per_epoch: int | None
    epoch_note: str  # why they are not known; empty where they are
    cluster: Cluster
    usable_bytes: int
    by_formula: str  # why activations are by formula and not counted; empty where they are counted
    buckets_note: str  # where the sizes of buckets are not those of ds_configs/; empty where they are
    rows: list[Row]
    asked_checkpointing: Checkpointing  # as the recipe has it
    recommended: Row | None
    evaluation_note: str  # where an evaluation would not fit
    command: str | None

    def as_json(self) -> dict[str, Any]:
        """The same for a program."""
        return asdict(self)


def plan_run(config: Config, cluster: Cluster, recipe: str, overrides: list[str]) -> Outlook:
    """The outlook of a recipe on a cluster that was checked; nothing is loaded but the model's configuration."""
    config = _settled(config)
    train, block_size = config.train, config.data.block_size
    manifest = _prepared(config)
    built = _configuration(config, manifest)
    mixed = train.mixed_precision != "no"
    zero, buckets_note = zero_settings(config, cluster.gpus, hidden_size(built))
    task = Task(shapes(config.model, built), block_size, train.global_batch_size, mixed, cluster, zero)
    memory, by_formula = _activations(config, built, task)
    found = rows(task, memory)
    best = recommend(found)
    room = largest_evaluation(best, task, _whole_logits(config, built)) if best else 0
    evaluated = config.evaluate.micro_batch_size
    settings = [f"evaluate.micro_batch_size={room}"] if 0 < room < evaluated else []
    steps, note = _epoch(config, manifest)
    return Outlook(
        model=str(config.model.name or config.model.type),
        parameters=task.shapes.parameters,
        trained=task.shapes.trained,
        mixed_precision=train.mixed_precision,
        block_size=block_size,
        global_batch_size=train.global_batch_size,
        tokens_per_step=task.tokens_per_step,
        steps_per_epoch=steps,
        tokens_per_epoch=manifest.splits["train"].blocks * block_size if manifest and steps else None,
        epoch_note=note,
        cluster=cluster,
        usable_bytes=cluster.usable,
        by_formula=by_formula,
        buckets_note=buckets_note,
        rows=found,
        asked_checkpointing=train.activation_checkpointing,
        recommended=best,
        evaluation_note=_evaluation_note(evaluated, room) if best else "",
        command=command_for(best, cluster, recipe, [*overrides, *settings], train.activation_checkpointing)
        if best
        else None,
    )


def command_for(
    row: Row, cluster: Cluster, recipe: str, overrides: list[str], checkpointing: Checkpointing = False
) -> str:
    """What launches a row: topology from accelerate_configs/, the rest as overrides behind those that were given.

    checkpointing: what the recipe says of it.
    """
    own = ("train.micro_batch_size=", "train.activation_checkpointing=")
    kept = [text for text in overrides if not text.startswith(own)]
    settings = [f"train.micro_batch_size={row.micro_batch_size}"]
    if row.activation_checkpointing or checkpointing:
        settings.append(f"train.activation_checkpointing={str(row.activation_checkpointing).lower()}")
    words = ["accelerate", "launch", "--config_file", f"accelerate_configs/{row.strategy}.yaml"]
    words += ["--num_processes", str(cluster.gpus)]
    nodes = ""
    if cluster.nodes > 1:
        nodes = f" --num_machines {cluster.nodes} --machine_rank $NODE_RANK --main_process_ip $MAIN_HOST"
        nodes += " --main_process_port 29500"
        if row.strategy.startswith("zero"):  # Accelerate's own would need ssh between the nodes
            nodes += " --deepspeed_multinode_launcher standard"
    program = ["-m", "clm_dist", "train", recipe, *kept, *settings]
    return f"{shlex.join(words)}{nodes} {shlex.join(program)}"


def _evaluation_note(sequences: int, room: int) -> str:
    """What to do where evaluating so many sequences at a time does not fit beside the model."""
    if sequences <= room:
        return ""
    remedy = f"the command sets {room}" if room else "take larger GPUs or a smaller data.block_size"
    return f"evaluate.micro_batch_size={sequences} does not fit, {room} sequences do; {remedy}"


def _settled(config: Config) -> Config:
    """On the GPUs that are planned for, auto is bf16."""
    if config.train.mixed_precision != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": "bf16"})})


def _prepared(config: Config) -> Manifest | None:
    if not (Path(config.data.prepared_dir) / MANIFEST).is_file():
        return None
    return read_manifest(config.data.prepared_dir)


def _configuration(config: Config, manifest: Manifest | None) -> Any:
    """The model's configuration, of the vocabulary that the data has or will have."""
    vocab_size = manifest.vocab_size if manifest else config.data.tokenizer_vocab_size
    built = model_configuration(config.model, {} if vocab_size is None else {"vocab_size": vocab_size})
    check_fits(
        built, config.data.block_size, vocab_size or 0, config.model.called, bool(config.model.pad_vocab_to_multiple_of)
    )
    built.use_cache = False  # as in training
    return built


def _epoch(config: Config, manifest: Manifest | None) -> tuple[int | None, str]:
    """Steps of one epoch, or why they are not known."""
    if manifest is None:
        return None, f"nothing is prepared in {config.data.prepared_dir} yet: run `clm-dist prepare`"
    prepared = manifest.options["block_size"]
    if prepared != config.data.block_size:
        return (
            None,
            f"{config.data.prepared_dir} holds blocks of {prepared} tokens: prepare for {config.data.block_size}",
        )
    return steps_of_epochs(1, manifest.splits["train"].blocks, config.train.global_batch_size), ""


def _whole_logits(config: Config, built: Any) -> int:
    """The vocabulary, where logits are made whole; else 0."""
    import torch

    from clm_dist.planning.activations import has_head

    with torch.device("meta"):
        chunked = config.train.chunked_loss and has_head(outline(config.model, built))
    return 0 if chunked else int(built.get_text_config().vocab_size)


def _activations(config: Config, built: Any, task: Task) -> tuple[dict[tuple[str, Checkpointing], Activations], str]:
    """Activations by (precision, checkpointing), counted; by formula with the reason where a model defies that.

    Checkpointing is none, full, and the selective kind where the recipe has it.
    """
    from clm_dist.planning import activations

    build: Callable[[Any], Any] = partial(outline, config.model, built)
    kinds: set[Checkpointing] = {False, True, config.train.activation_checkpointing}
    wanted = {(precision_of(strategy, task.mixed), kind) for strategy in STRATEGIES for kind in kinds}
    found: dict[tuple[str, Checkpointing], Activations] = {}
    why = ""
    for precision, checkpointing in progress(sorted(wanted, key=str), "counting activations", "micro-step"):
        try:
            found[precision, checkpointing] = activations.count(
                build, task.block_size, precision, checkpointing, config.train.chunked_loss
            )
        except UserError:
            if not checkpointing:
                raise
            continue  # the architecture has no checkpointing
        except Exception as error:  # whatever a model does with values that are not there
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            vocab_size = built.get_text_config().vocab_size
            found[precision, checkpointing] = activations.formula(
                task.shapes, vocab_size, task.block_size, precision, checkpointing
            )
    return found, why
