"""The one typed tree: YAML recipe, command-line override, `--help` and the record in the run folder.

Every field says its unit, its range and why its default is what it is. Reading and reporting stand in `recipe.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from clm_dist.fields import Count, Location, Policy, Seconds, Sources, numbers


class Section(BaseModel):
    """A frozen part of the tree; unknown keys are refused (and reported with the nearest name)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class MixtureEntry(Section):
    """One source of a mixture. What it leaves out is that of `data`."""

    source: Sources = Field(description="As data.source.")
    weight: float = Field(gt=0, description="Share of the tokens, relative to the other weights.")
    config_name: str | None = Field(None, description="As data.config_name.")
    revision: str | None = Field(None, description="As data.revision.")
    text_column: str | None = Field(None, description="As data.text_column. None: that of `data`.")


class DataConfig(Section):
    """Which text, cut into which blocks."""

    source: Sources | None = Field(
        None,
        description="Local files, folders or globs, one or a list (.json, .jsonl, .csv, .txt, .parquet, each also .gz), "
        "or a data set on the Hub (owner/name).",
    )
    mixture: tuple[MixtureEntry, ...] = Field(
        (),
        description="Instead of `source`: several, each with a weight. At every moment each has its share of the tokens, "
        "to within one document.",
    )
    mixture_stop: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="When a mixture ends: with the first source that has no more (nothing is repeated), or when all were "
        "read (smaller ones are repeated; documents held out for evaluation never are).",
    )
    config_name: str | None = Field(None, description="Configuration of a Hub data set that has several.")
    revision: str | None = Field(
        None, description="Commit or tag of a Hub data set. None takes the newest and records which that was."
    )
    streaming: bool = Field(
        False,
        description="Read a Hub data set as it comes instead of fetching it first: for sets larger than the disk.",
    )
    train_split: str = Field("train", description="Split to train on. A local source without splits is all `train`.")
    eval_split: str | None = Field(
        None,
        description="Named split to evaluate on (instead of eval_fraction). Locally: files with this word in the name.",
    )
    eval_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the documents of train_split held out for evaluation; 0: no evaluation.",
    )
    split_seed: int = Field(
        42,
        ge=0,
        lt=2**63,
        description="Which documents eval_fraction holds out. Apart from `seed`, so that runs of several seeds "
        "share one evaluation set.",
    )
    text_column: str = Field("text", description="Column with the text; dots reach into nested ones (answers.text).")
    text_separator: str = Field(" ", description="Joins a column that holds a list of texts, as the guide does.")
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="A broken record ends the work, or is left out, counted, and written to bad_records.jsonl.",
    )
    deduplicate: bool = Field(False, description="Leave out exact copies of a document; the first of them stays.")
    min_document_tokens: Count | None = Field(None, description="Leave out documents of fewer tokens.")
    max_document_tokens: Count | None = Field(None, description="Leave out documents of more tokens.")
    append_eos: bool = Field(
        True,
        description="End-of-text after every document, so that the model learns where one ends. The guide does not.",
    )
    tokenizer: Location | None = Field(None, description="Folder or Hub id of the tokenizer. None: that of model.name.")
    tokenizer_vocab_size: int | None = Field(
        None,
        ge=257,
        description="Train a byte-level BPE of so many tokens on the training documents instead of loading one.",
    )
    block_size: int = Field(
        128, ge=2, description="Tokens per training sequence (T). The guide's 128 fits small memory."
    )
    packing: Literal["concatenate", "best_fit"] = Field(
        "concatenate",
        description="One stream of text cut every block_size tokens, as the guide does; or whole documents into blocks "
        "where they fit best, the rest of a block padding, and only documents longer than a block cut.",
    )
    independent_shards: Count | None = Field(
        None,
        description="Group the text in so many parts, each by itself: less than one block is lost in each of them instead "
        "of in the whole split.",
    )
    prepared_dir: Location = Field(description="Folder for the blocks on disk: written by `prepare`, read by `train`.")

    def entries(self) -> tuple[MixtureEntry, ...]:
        """The sources one by one, each complete: those of `mixture`, or `source` alone."""
        alone = MixtureEntry(source=self.source or "", weight=1, config_name=self.config_name, revision=self.revision)
        column = self.text_column
        entries = self.mixture or (alone,)
        return tuple(entry.model_copy(update={"text_column": entry.text_column or column}) for entry in entries)


class ModelConfig(Section):
    """Which model: `name` (a folder or Hub id), or `type` with random weights."""

    name: Location | None = Field(None, description="Folder or Hub id of a causal language model.")
    revision: str | None = Field(None, description="Commit or tag of `name` on the Hub. None: the newest.")
    from_scratch: bool = Field(False, description="Take only the configuration of `name`; random weights.")
    type: str | None = Field(
        None, description="Architecture to build from scratch, e.g. gpt2 (a transformers model_type)."
    )
    config: Annotated[dict[str, Any], AfterValidator(numbers)] = Field(
        default_factory=dict,
        description="Settings of the model's own configuration, e.g. model.config.n_layer=4.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with `name`. Off: it can do anything."
    )


class OptimConfig(Section):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) and the learning-rate schedule."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate. 5e-5 is Trainer's default for fine-tuning.")
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="Decoupled decay of matrices and embeddings; biases and norms have none. The guide's value.",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment; 0.95 is usual for large batches.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Global gradient norm to clip at; Trainer's default. null: no clipping."
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear",
        description="Shape after warm-up: to min_lr_ratio at max_steps. wsd: constant, then linear over decay_steps.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear rise from lr/warmup_steps to lr.")
    decay_steps: int | None = Field(
        None, ge=1, description="Length of the final decay, in steps; for schedule=wsd only."
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Floor of the decay as a share of lr. 0 is Trainer's.")


class TrainConfig(Section):
    """How long, in which batches. The number of processes belongs to `accelerate launch`, not here."""

    epochs: float | None = Field(None, gt=0, description="Passes over the training blocks (or set max_steps).")
    max_steps: Count | None = Field(None, description="Optimizer updates (or set epochs).")
    global_batch_size: Count = Field(
        8,
        description="Sequences per step over all processes, at every world size. 8 is Trainer's on one device.",
    )
    micro_batch_size: Count | None = Field(
        None,
        description="Sequences per process per forward (B); lower it when memory is short: accumulation makes up for it "
        "and the result stays, but for dropout, whose masks go by it. None: global_batch_size / number of processes.",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="Precision of forward and backward; the optimizer's weights, its states and all sums stay fp32. auto: "
        "bf16 on a GPU that has it, else no (fp32). fp16 scales the loss and needs a GPU; fp8 is experimental.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only each block's input for backward and compute the rest again: less memory, a third more "
        "computation, the same result.",
    )
    isolate_documents: bool = Field(
        False,
        description="Attention, positions and loss stop where a document ends within a block; evaluation likewise. Models "
        "that cannot are refused.",
    )
    log_every: Count = Field(10, description="Steps between log lines.")
    resume: Location = Field(
        "auto",
        description="auto: go on from the newest whole checkpoint of run_dir, or begin where there is none; never: refuse a "
        "folder that holds a run; or the path of a checkpoint.",
    )
    resume_changes: tuple[str, ...] = Field(
        (),
        description="Fields that may differ from the checkpoint's although they change what is learned, e.g. [optim.lr].",
    )
    stop_after: Seconds | None = Field(
        None,
        description="Wall-clock limit of this start of the run (seconds, 90m, 4h, 3:55:00): saves and leaves before it. "
        "None: the end of the Slurm job, where there is one.",
    )
    on_nonfinite: Policy = Field(
        "stop",
        description="A loss or gradient that is no finite number: save and stop; withhold the update and go on; or go back "
        "to the last checkpoint and past the data up to here.",
    )
    on_spike: Literal["ignore", "stop", "skip", "rewind"] = Field(
        "ignore", description="The same for a loss far above those of the last 64 steps."
    )
    spike_deviations: float = Field(
        6.0, gt=0, description="How far is far: standard deviations of the last 64 losses above their mean."
    )
    compare_ranks_every: Count = Field(
        100, description="Steps between comparisons of weights, learning rate and data position over all processes."
    )
    hang_seconds: float = Field(
        600,
        gt=0,
        description="A process that gets no further for so long is named with its stack, and the run ends. Longer than the "
        "longest evaluation batch, export or save.",
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `no` as false."""
        return "no" if value is False else value


class CheckpointConfig(Section):
    """How often the state of a run is saved, and what is kept of it."""

    save_every: Count = Field(500, description="Steps between checkpoints; the last step and every stop save too.")
    keep_last: Count = Field(2, description="Newest checkpoints to keep. Two: one may turn out to be damaged.")
    keep_every: Count | None = Field(None, description="Keep those of every so many steps for good.")
    keep_best: int = Field(0, ge=0, description="Keep so many with the lowest evaluation loss at their own step.")
    asynchronous: bool = Field(
        True,
        description="Training goes on from a copy in memory while a checkpoint is written. Costs its size in memory.",
    )


class EvaluateConfig(Section):
    """Exact evaluation: every block of the evaluation split once, whatever the number of processes."""

    every_steps: Count | None = Field(None, description="Steps between evaluations. None: at the end of each epoch.")
    micro_batch_size: Count = Field(8, description="Sequences per forward. 8 is Trainer's default.")


class GenerateConfig(Section):
    """Sampling, for `generate`, for samples at each evaluation, and as the exported model's default."""

    prompts: tuple[str, ...] = Field((), description="Continued at every evaluation; shown in the report.")
    max_new_tokens: Count = Field(100, description="Tokens to add at most. 100 is the guide's.")
    do_sample: bool = Field(True, description="Draw from the distribution; false: always the likeliest token.")
    temperature: float = Field(
        1.0, gt=0, description="Divides the logits before sampling; 1 leaves the model as trained."
    )
    top_k: int = Field(50, ge=0, description="Sample among the k likeliest tokens; 0: all. The guide's value.")
    top_p: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Sample among the likeliest tokens of this total probability. The guide's.",
    )


class TrackConfig(Section):
    """Dashboards on top of metrics.jsonl, which is always written."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="Any of tensorboard, wandb.")
    project: str = Field("clm-dist", description="Project name shown by the dashboard.")
    wandb_mode: Literal["offline", "online"] = Field(
        "offline",
        description="offline writes into the run folder for a later `wandb sync`: compute nodes rarely have a route.",
    )


class PublishConfig(Section):
    """What the model card of the exported folder says beside the measured figures."""

    language: str = Field("en", description="Language tag of the text.")
    license: str | None = Field(None, description="License identifier, e.g. apache-2.0. None: the card names none.")


class Config(Section):
    """A run: what is learned. Where it runs stands in accelerate_configs/."""

    run_dir: Location = Field(description="Folder of the run: config.yaml, metrics.jsonl, model/, report.html, ...")
    seed: int = Field(42, ge=0, lt=2**32, description="Order of the blocks, initial weights, dropout.")
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    track: TrackConfig = TrackConfig()
    publish: PublishConfig = PublishConfig()
