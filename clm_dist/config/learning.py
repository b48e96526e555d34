"""`model`, `optim`, `train`, `checkpoint`: what is learned, and what keeps it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from clm_dist.config.section import Section
from clm_dist.fields import CheckpointingField, Count, Location, Names, Policy, Seconds, numbers


class LoraConfig(Section):
    """Adapters of low rank (LoRA: Hu et al., arXiv:2106.09685) are trained, the model itself is frozen."""

    rank: Count = Field(8, description="Inner size of an adapter; it has rank x (in + out) weights for each layer.")
    alpha: Count = Field(16, description="What an adapter adds is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapters' inputs left out in training.")
    target_modules: Names | None = Field(
        None,
        description="Linear layers with an adapter, by the endings of their names, e.g. [q_proj,v_proj]; all-linear: all "
        "but the head. None: peft's choice for the architecture, where it has none all-linear.",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732): for ranks of 64 and more.")


class ModelConfig(Section):
    """Which model: `name` (a folder or Hub id), or `type` with random weights."""

    name: Location | None = Field(None, description="Folder or Hub id of a causal language model.")
    revision: str | None = Field(None, description="Commit or tag of `name` on the Hub. None: the newest.")
    from_scratch: bool = Field(False, description="Take only the configuration of `name`; random weights.")
    type: str | None = Field(
        None,
        description="Architecture to build from scratch, e.g. gpt2 (a transformers model_type; `clm-dist architectures`).",
    )
    config: Annotated[dict[str, Any], AfterValidator(numbers)] = Field(
        default_factory=dict,
        description="Settings of the model's own configuration, e.g. model.config.n_layer=4.",
    )
    preset: Literal["tiny", "small"] | None = Field(
        None, description="Sizes for `type` by name; model.config.* lies over them. None: the architecture's own."
    )
    pad_vocab_to_multiple_of: Count | None = Field(
        None, description="Make the embedding so long that this divides it, e.g. 64: faster on GPUs."
    )
    attention: str | None = Field(
        None, description="How attention is computed: eager, sdpa, flash_attention_2, ... None: transformers' choice."
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train LoRA adapters and freeze the model, e.g. model.lora.rank=16. None: all weights are trained.",
    )
    check_causality: bool = Field(
        True,
        description="At the start, change later tokens and see that earlier predictions stay, at the run's own block_size. "
        "Off: a model that sees the future trains without a word.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with `name`. Off: it can do anything."
    )

    @property
    def called(self) -> str:
        """What messages call it."""
        return str(self.name or self.type)


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
    activation_checkpointing: CheckpointingField = Field(
        False,
        description="Keep only each block's input for backward and compute the rest again: less memory, a third more "
        "computation, the same result. selective: keep what matrix products and fused attention give as well.",
    )
    chunked_loss: bool = Field(
        True,
        description="Compute the head and the loss for some tokens at a time: the logits of a batch, the largest thing in a "
        "small model's training, are never whole. Off: all at once, to compare with.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile of the model's blocks. auto: on a GPU without DeepSpeed, for architectures that are "
        "proved to compile; a CPU would compile for minutes.",
    )
    cuda_graph: Literal["auto", "off"] = Field(
        "auto",
        description="Record a micro-step once and launch it by one call. auto: on a GPU, in one process, where launching "
        "kernel by kernel takes the CPU more than half of the micro-step's time. The result is the same.",
    )
    deterministic: bool = Field(
        True,
        description="On a GPU: only kernels that give the same bits every time, so that a resumed run is one never stopped.",
    )
    isolate_documents: bool = Field(
        False,
        description="Attention, positions and loss stop where a document ends within a block; evaluation likewise. Models "
        "that cannot are refused.",
    )
    log_every: Count = Field(10, description="Steps between log lines.")
    profile_steps: tuple[Count, Count] | None = Field(
        None,
        description="First and last step of which torch's profiler writes a trace into the run folder, e.g. [20, 22].",
    )
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

    @field_validator("compile", "cuda_graph", mode="before")
    @classmethod
    def _on_and_off_are_words(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `on` as true."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


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
