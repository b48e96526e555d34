"""The one typed tree: YAML recipe, command-line override, `--help` and the record in the run folder.

Every field says its unit, its range and why its default is what it is. Reading and reporting stand in `recipe.py`.
"""

from pydantic import Field

from clm_dist.config.data import DataConfig, MixtureEntry
from clm_dist.config.learning import CheckpointConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from clm_dist.config.results import EvaluateConfig, GenerateConfig, HubConfig, PublishConfig, TrackConfig
from clm_dist.config.section import Section
from clm_dist.fields import Location

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "EvaluateConfig", "GenerateConfig", "HubConfig", "LoraConfig",
    "MixtureEntry", "ModelConfig", "OptimConfig", "PublishConfig", "Section", "TrackConfig", "TrainConfig",
]  # fmt: skip


class Config(Section):
    """A run: what is learned. Where it runs stands in accelerate_configs/."""

    run_dir: Location = Field(description="Folder of the run: config.yaml, metrics.jsonl, model/, report.html, ...")
    seed: int = Field(42, ge=0, lt=2**32, description="Order of the blocks, initial weights, dropout.")
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    publish: PublishConfig = Field(default_factory=PublishConfig)
