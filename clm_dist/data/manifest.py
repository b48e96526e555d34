"""The label on prepared data: what it was made of, what it holds, and whether it is what a recipe asks for."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clm_dist.config import Config
from clm_dist.errors import ConfigError, UserError

MANIFEST = "manifest.json"
FORMAT = 1
# data.* fields that decide which blocks come out; source and tokenizer are compared by contents instead.
OPTIONS = (
    *("train_split", "eval_split", "eval_fraction", "split_seed"),
    *("text_column", "text_separator", "append_eos", "block_size"),
)


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds. tokens == blocks * block_size + remainder, remainder < block_size."""

    documents: int
    empty_documents: int  # left out: no text, so no tokens and no end-of-text either
    bytes: int  # UTF-8 bytes of the documents
    tokens: int  # end-of-text included
    blocks: int
    remainder: int  # tokens at the end of the split that fill no block


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    options: dict[str, Any]
    source: str
    source_identity: dict[str, Any]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    splits: dict[str, SplitCounts]
    versions: dict[str, str]
    format: int = field(default=FORMAT)

    def save(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def tokens_per_byte(self, split: str) -> float:
        """Turns nats per token into nats per byte of the original text."""
        counts = self.splits[split]
        return counts.tokens / counts.bytes


def source_name(config: Config) -> str:
    """What the recipe calls its source: for people, and to know whether it has to be read to be compared."""
    data = config.data
    parts = [data.source, data.config_name and f"configuration {data.config_name}"]
    return ", ".join(filter(None, [*parts, data.revision and f"revision {data.revision}"]))


def options_of(config: Config) -> dict[str, Any]:
    """What the recipe asks for, as the manifest records it."""
    return {name: getattr(config.data, name) for name in OPTIONS}


def read_manifest(prepared_dir: str) -> Manifest:
    """The manifest of prepared data; UserError with the command to run where there is none."""
    path = Path(prepared_dir) / MANIFEST
    if not path.is_file():
        raise UserError(f"data.prepared_dir={prepared_dir} holds no prepared data; run `clm-dist prepare RECIPE` first")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, this version reads {FORMAT}; prepare again elsewhere"
            )
        values["splits"] = {name: SplitCounts(**counts) for name, counts in values["splits"].items()}
        return Manifest(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove the folder and prepare again") from None


def check_fits(manifest: Manifest, config: Config, source_identity: Any, tokenizer_sha256: str) -> None:
    """Raises ConfigError with both values of everything in which prepared data differs from the recipe.

    Source and tokenizer are compared by contents: a renamed file is the same, one changed merge is another.
    """
    where = config.data.prepared_dir
    wanted = options_of(config)
    problems = [
        f"{where} was prepared with data.{name}={manifest.options.get(name)!r}, the recipe says {wanted[name]!r}"
        for name in OPTIONS
        if manifest.options.get(name) != wanted[name]
    ]
    if manifest.source_identity != source_identity:
        problems.append(
            f"{where} was prepared from {manifest.source} with contents {_short(manifest.source_identity)}, "
            f"data.source={config.data.source} has contents {_short(source_identity)}"
        )
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        problems.append(
            f"{where} was prepared with tokenizer {manifest.tokenizer} (sha256 {manifest.tokenizer_sha256[:12]}), "
            f"the tokenizer given has sha256 {tokenizer_sha256[:12]}"
        )
    if problems:
        problems.append(
            "to have both, set another data.prepared_dir and prepare again; to replace it, remove the folder first"
        )
        raise ConfigError(problems)


def _short(identity: Any) -> str:
    """The start of every hash in an identity; enough to tell two apart."""
    if isinstance(identity, dict):
        return ", ".join(f"{key}: {_short(value)}" for key, value in identity.items())
    if isinstance(identity, list):
        return "[" + ", ".join(_short(value) for value in identity) + "]"
    return str(identity)[:12]
