"""The one typed tree: YAML recipe, command-line override, `--help` and the record in the run folder.

Every field says its unit, its range and why its default is what it is. Reading and reporting stand in `recipe.py`.
"""

import re
from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Count = Annotated[int, Field(ge=1)]
Location = Annotated[str, AfterValidator(expanduser)]  # a path or Hub id; ~ means home, in a recipe too


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text. A field's type mends that; a model's own settings have none here."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value


class Section(BaseModel):
    """A frozen part of the tree; unknown keys are refused (and reported with the nearest name)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class DataConfig(Section):
    """Which text, cut into which blocks."""

    source: Location = Field(
        description="A local file, folder or glob (.json, .jsonl, .csv, .txt, .parquet, each also .gz), or a data "
        "set on the Hub (owner/name)."
    )
    config_name: str | None = Field(None, description="Configuration of a Hub data set that has several.")
    revision: str | None = Field(
        None, description="Commit or tag of a Hub data set. None takes the newest and records which that was."
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
    text_column: str = Field(
        "text",
        description="Column with the text; dots reach into nested columns (answers.text). Ignored for .txt.",
    )
    text_separator: str = Field(" ", description="Joins a column that holds a list of texts, as the guide does.")
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
    prepared_dir: Location = Field(description="Folder for the blocks on disk: written by `prepare`, read by `train`.")


class ModelConfig(Section):
    """Which model: `name` (a folder or Hub id), or `type` with random weights."""

    name: Location | None = Field(None, description="Folder or Hub id of a causal language model.")
    revision: str | None = Field(None, description="Commit or tag of `name` on the Hub. None: the newest.")
    from_scratch: bool = Field(False, description="Take only the configuration of `name`; random weights.")
    type: str | None = Field(
        None, description="Architecture to build from scratch, e.g. gpt2 (a transformers model_type)."
    )
    config: Annotated[dict[str, Any], AfterValidator(_numbers)] = Field(
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
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no",
        description="Precision of forward and backward; weights, optimizer and sums stay fp32. fp16 needs a GPU.",
    )
    log_every: Count = Field(10, description="Steps between log lines; the only regular synchronisation of training.")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `no` as false."""
        return "no" if value is False else value


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
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    track: TrackConfig = TrackConfig()
    publish: PublishConfig = PublishConfig()


def disagreements(config: Config) -> list[str]:
    """Problems between fields, each with its remedy; empty when the tree makes sense as a whole."""
    data, model, optim, train = config.data, config.model, config.optim, config.train
    problems = []
    if (model.name is None) == (model.type is None):
        given = f"model.name={model.name} and model.type={model.type} are given"
        problems.append(f"{given}; set one of them: a name to load, or a type to build from scratch")
    if model.from_scratch and model.name is None:
        problems.append(
            "model.from_scratch=true needs model.name; model.type is always built from scratch: leave it out"
        )
    if data.tokenizer is not None and data.tokenizer_vocab_size is not None:
        problems.append(
            f"data.tokenizer={data.tokenizer} would be loaded and data.tokenizer_vocab_size="
            f"{data.tokenizer_vocab_size} trained; set one of them"
        )
    if data.tokenizer is None and data.tokenizer_vocab_size is None and model.name is None:
        problems.append(
            "no tokenizer: set data.tokenizer (a folder or Hub id) or data.tokenizer_vocab_size (to train one)"
        )
    if (data.eval_split is None) == (data.eval_fraction is None):
        given = f"data.eval_split={data.eval_split} and data.eval_fraction={data.eval_fraction} are given"
        problems.append(f"{given}; set one of them (eval_fraction=0.2 as the guide, 0 for no evaluation)")
    if data.eval_split is not None and data.eval_split == data.train_split:
        problems.append(f"data.eval_split={data.eval_split} is also data.train_split; evaluate on other text")
    if (train.epochs is None) == (train.max_steps is None):
        problems.append(f"train.epochs={train.epochs} and train.max_steps={train.max_steps} are given; set one of them")
    if train.micro_batch_size is not None and train.global_batch_size % train.micro_batch_size:
        problems.append(
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
            f"{train.micro_batch_size}; set a micro_batch_size among {divisors(train.global_batch_size)}"
        )
    if (optim.decay_steps is not None) != (optim.schedule == "wsd"):
        problems.append(
            f"optim.schedule={optim.schedule} with optim.decay_steps={optim.decay_steps}: decay_steps is for wsd, "
            "which needs it; change one of them"
        )
    if train.max_steps is not None and optim.warmup_steps + (optim.decay_steps or 0) > train.max_steps:
        problems.append(
            f"optim.warmup_steps={optim.warmup_steps} and decay_steps={optim.decay_steps or 0} do not fit into "
            f"train.max_steps={train.max_steps}; shorten them"
        )
    return problems


def divisors(number: int) -> str:
    """The divisors of `number` as text, smallest first: '1, 2, 4'."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
