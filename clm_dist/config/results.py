"""`evaluate`, `generate`, `track`, `publish`: what is seen of a run, and what leaves it."""

from typing import Literal

from pydantic import Field

from clm_dist.config.section import Section
from clm_dist.fields import Count, RepositoryName, Seconds


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
    """Dashboards on top of metrics.jsonl, which is always written. Keys come from the environment only."""

    trackers: tuple[Literal["wandb", "tensorboard", "trackio", "mlflow"], ...] = Field(
        (), description="Any of wandb, tensorboard, trackio, mlflow; each is an extra of the package."
    )
    project: str = Field("clm-dist", description="Project (MLflow: experiment) that dashboards file the run under.")
    name: str | None = Field(None, description="Name of the run on dashboards. None: that of its folder.")
    entity: str | None = Field(None, description="Team or user that owns the W&B run. None: the key's default.")
    group: str | None = Field(
        None, description="W&B group. None: array-ID in a SLURM job array, so that a sweep stands together."
    )
    tags: tuple[str, ...] = Field((), description="W&B tags, for filters in its table of runs.")
    wandb_mode: Literal["auto", "online", "offline"] = Field(
        "auto",
        description="auto: online with a key and a route, else offline; offline: rows wait for `clm-dist sync RUN`. "
        "WANDB_MODE of the environment goes first.",
    )
    wait_seconds: float = Field(
        15,
        ge=0,
        le=600,
        description="At most so long a finished run waits for dashboards to confirm; the rest is for `clm-dist sync`.",
    )


class HubConfig(Section):
    """Pushing to the Hugging Face Hub, in the background: docs/hub.md."""

    repo: RepositoryName | None = Field(None, description="owner/name on the Hub. None: nothing is pushed.")
    when: Literal["end", "best", "steps"] = Field(
        "end",
        description="end: the finished model; best: each best one so far; steps: every every_steps, and the finished one.",
    )
    every_steps: Count | None = Field(None, description="Steps between pushes, with when=steps.")
    private: bool = Field(True, description="Of a repository that is made. Only you see it, until you say otherwise.")
    branch: str = Field("main", min_length=1, description="What is committed to; made where there is none.")
    tag_steps: bool = Field(True, description="Tag each push step-N, so that it can be loaded by revision.")
    replace: bool = Field(
        False, description="Whether a repository with another model may be pushed over (its history keeps that)."
    )
    timeout: Seconds = Field(120, description="Seconds that the Hub may be silent before a call counts as failed.")
    wait_seconds: float = Field(
        120, ge=0, description="At most so long a finished run waits for its push; the rest is for `clm-dist push RUN`."
    )


class PublishConfig(Section):
    """What the model card of the exported folder says beside the measured figures, and where it is pushed."""

    language: str = Field("en", description="Language tag of the text.")
    license: str | None = Field(None, description="License identifier, e.g. apache-2.0. None: the card names none.")
    hub: HubConfig = Field(default_factory=HubConfig)
