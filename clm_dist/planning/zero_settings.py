"""The sizes that DeepSpeed would be given by each file of accelerate_configs/, resolved as `train` resolves them. Pure but
for reading these files."""

from pathlib import Path
from typing import Any

from clm_dist.config import Config
from clm_dist.errors import ConfigError
from clm_dist.planning.deepspeed_checks import ZERO
from clm_dist.planning.deepspeed_config import resolve
from clm_dist.planning.deepspeed_launch import read
from clm_dist.planning.memory import STRATEGIES, ZeroSettings

TOPOLOGIES = Path("accelerate_configs")  # as in the command that is recommended: from the root of the repository


def zero_settings(config: Config, gpus: int, hidden_size: int | None) -> tuple[dict[str, ZeroSettings], str]:
    """By the name of a strategy; and what to say where files are not here (DeepSpeed's own sizes then stand in).

    config: of a settled precision, not auto.
    """
    found, missing = {}, []
    for strategy in STRATEGIES:
        if strategy.by_deepspeed:
            path = TOPOLOGIES / f"{strategy.name}.yaml"
            if path.is_file():
                found[strategy.name] = _settings(path, config, gpus, hidden_size)
            else:
                missing.append(str(path))
    note = f"buckets are of DeepSpeed's own sizes, for want of {', '.join(missing)} here" if missing else ""
    return found, note


def _settings(path: Path, config: Config, gpus: int, hidden_size: int | None) -> ZeroSettings:
    import yaml

    topology = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = (topology.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if source is None:
        raise ConfigError([f"{path} names no deepspeed_config_file; set one of ds_configs/ under deepspeed_config"])
    values = read(source)
    # all that costs memory stands in this section; the numbers of the recipe are checked when it is launched
    settled = resolve(
        {ZERO: values.get(ZERO)},
        source,
        config,
        world_size=gpus,
        micro_batch_size=1,
        gradient_accumulation_steps=config.train.global_batch_size // gpus,
        hidden_size=hidden_size,
        device="cuda",
    )
    zero: dict[str, Any] = settled.values[ZERO]
    known = ZeroSettings.__dataclass_fields__
    return ZeroSettings(**{key: value for key, value in zero.items() if key in known})
