"""Whether a checkpoint is of the run that a recipe describes: what is learned must be the same, where it runs may not be."""

import hashlib
import json
from typing import Any

import yaml

from clm_dist.checkpoint.folder import CONFIG, Checkpoint
from clm_dist.config import Config

# What a recipe says beside what is learned: where, how often looked at, how guarded, how shown. Everything else counts.
NOT_LEARNED = (
    *("run_dir", "checkpoint", "evaluate", "generate", "track", "publish", "model.trust_remote_code"),
    "model.check_causality",
    *("train.micro_batch_size", "train.log_every", "train.resume", "train.resume_changes", "train.stop_after"),
    *("train.on_nonfinite", "train.on_spike", "train.spike_deviations", "train.compare_ranks_every"),
    *(
        "train.hang_seconds",
        "train.activation_checkpointing",
        "train.deterministic",
        "train.chunked_loss",
        "train.compile",
        "train.cuda_graph",
    ),
    "train.profile_steps",
)

PRECISION = "train.mixed_precision"


def data_sha256(key: str, files: dict[str, dict[str, Any]]) -> str:
    """The hash of prepared data: what it was made of, and the blocks themselves. Not where it lies."""
    blocks = {name: file["sha256"] for name, file in files.items()}
    return hashlib.sha256(json.dumps([key, blocks], sort_keys=True).encode()).hexdigest()


def differences(saved: dict[str, Any], config: Config, data_changed: bool | None) -> dict[str, str]:
    """The fields of what is learned that differ, each with both values. A mixed_precision of auto differs from none: what it
    is, is known later.

    data_changed: whether the prepared data is other data. If not, its fields may say what they like (another place, a
    renamed file); None: not known, so that its fields decide.
    """
    wanted, found = _flat(config.model_dump(mode="json")), _flat(saved)
    if config.train.mixed_precision == "auto":
        wanted[PRECISION] = found.get(PRECISION)
    fields = {
        name: f"{found.get(name)!r} -> {wanted.get(name)!r}"
        for name in sorted(wanted | found)
        if wanted.get(name) != found.get(name) and _counts(name) and not name.startswith("data.")
    }
    if data_changed is not False:
        options = {
            name: f"{found.get(name)!r} -> {wanted.get(name)!r}"
            for name in sorted(wanted | found)
            if name.startswith("data.") and name != "data.prepared_dir" and wanted.get(name) != found.get(name)
        }
        if data_changed and not options:
            options = {"data.source": f"{wanted.get('data.source')} has other contents than before"}
        fields |= options
    return fields


def saved_configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """The resolved configuration of a checkpoint that has no problem."""
    values = yaml.safe_load((checkpoint.path / CONFIG).read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _counts(name: str) -> bool:
    return not any(name == other or name.startswith(f"{other}.") for other in NOT_LEARNED)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
