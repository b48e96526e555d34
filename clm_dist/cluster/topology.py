"""An Accelerate configuration and the DeepSpeed JSON that it names: read, checked, and copied for a job that waits."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from clm_dist.errors import UserError
from clm_dist.planning.deepspeed_launch import FIELDS, FILE_VARIABLE, read

KINDS = {"MULTI_GPU": {}, "DEEPSPEED": {"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP": {"ACCELERATE_USE_FSDP": "true"}}


@dataclass(frozen=True)
class Topology:
    """Where a run runs."""

    name: str
    values: dict[str, Any]  # of the YAML
    deepspeed: dict[str, Any] | None  # of the JSON that it names

    def environment(self, world_size: int) -> dict[str, str]:
        """What a launch with it tells its processes, as far as checks read it."""
        section = self.values.get("deepspeed_config") or {}
        found = {"WORLD_SIZE": str(world_size), **KINDS[self.values["distributed_type"]]}
        if self.deepspeed is not None:
            found[FILE_VARIABLE] = section["deepspeed_config_file"]
        for variable, (name, _) in FIELDS.items():
            if name in section:
                found[variable] = str(section[name])
        if self.values["distributed_type"] == "FSDP":
            found["FSDP_VERSION"] = str((self.values.get("fsdp_config") or {}).get("fsdp_version", 1))
        return found

    def at(self, folder: Path, nodes: int, world_size: int) -> "Topology":
        """The same as it will stand in a folder, for so many nodes."""
        values = {**self.values, "num_machines": nodes, "num_processes": world_size}
        values |= {"same_network": True, "rdzv_backend": "static"} if nodes > 1 else {}
        if values["distributed_type"] == "DEEPSPEED":
            section = dict(values["deepspeed_config"])
            section["deepspeed_multinode_launcher"] = "standard"  # the default needs ssh between the nodes
            if self.deepspeed is not None:
                section["deepspeed_config_file"] = str(folder.absolute() / f"{self.name}.json")
            values["deepspeed_config"] = section
        return replace(self, values=values)

    def files(self) -> dict[str, str]:
        """Names and texts of what is copied."""
        found = {f"{self.name}.yaml": yaml.safe_dump(self.values, sort_keys=False)}
        if self.deepspeed is not None:
            found[f"{self.name}.json"] = json.dumps(self.deepspeed, indent=2) + "\n"
        return found


def read_topology(given: str) -> Topology:
    """A file, or the name of one in accelerate_configs/; UserError where it starts no processes that can be joined."""
    path = Path(given)
    if not path.is_file():
        path = Path("accelerate_configs") / f"{given.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in Path("accelerate_configs").glob("*.yaml")))
        raise UserError(
            f"--config {given}: no such file; give an Accelerate YAML" + (f", or one of {known}" if known else "")
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    kind = values.get("distributed_type") if isinstance(values, dict) else None
    if kind not in KINDS:
        raise UserError(
            f"--config {path} has distributed_type={kind}, which joins no processes; set one of {', '.join(KINDS)} "
            "(accelerate_configs/ddp.yaml works without a GPU too)"
        )
    section = values.get("deepspeed_config") or {}
    file = section.get("deepspeed_config_file")
    return Topology(path.stem, values, None if file is None else read(str(file)))
