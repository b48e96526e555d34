"""The label on prepared data: what it was made of, what it holds, and whether it is what a recipe asks for."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clm_dist.config import Config, MixtureEntry
from clm_dist.errors import ConfigError, UserError

MANIFEST = "manifest.json"
HASH = re.compile(r"[0-9a-f]{40,}")
FORMAT = 2
# data.* fields that decide which blocks come out; source and tokenizer are compared by contents instead.
OPTIONS = (
    *("train_split", "eval_split", "eval_fraction", "split_seed"),
    *("text_column", "text_separator", "on_error", "deduplicate", "min_document_tokens", "max_document_tokens"),
    *("append_eos", "block_size", "packing", "independent_shards"),
)


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds. tokens + padding == blocks * block_size + remainder."""

    documents: int
    bytes: int  # UTF-8 bytes of the documents
    tokens: int  # end-of-text included
    blocks: int
    remainder: int  # tokens at the end (of each independent shard) that fill no block: fewer than block_size
    padding: int  # tokens that fill up blocks behind whole documents (data.packing=best_fit)
    cut_documents: int  # with best_fit: those longer than a block, the only ones that are cut
    shares: list[dict[str, Any]]  # by source of a mixture: weight, documents, tokens, passes


@dataclass(frozen=True)
class LeftOut:
    """Documents that were read and are in no split, by reason."""

    empty: int = 0  # nothing in them, or only white space
    bad: int = 0  # records that could not be read (data.on_error=skip); they stand in bad_records.jsonl
    too_short: int = 0
    too_long: int = 0
    copies: int = 0
    unused: int = 0  # of a mixture, when it ended with another source

    def __str__(self) -> str:
        named = {name.replace("_", " "): count for name, count in asdict(self).items() if count}
        if self.bad:
            named["bad records (bad_records.jsonl)"] = named.pop("bad")
        return ", ".join(f"{count:,} {name}" for name, count in named.items()) or "none"


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    key: str  # hash of all that decides the blocks: source contents, tokenizer contents, options
    options: dict[str, Any]
    source: str
    source_identity: Any
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str  # of an id on disk
    left_out: LeftOut
    splits: dict[str, SplitCounts]
    files: dict[str, dict[str, Any]]  # by path in the folder: sha256, bytes, and blocks where it holds some
    versions: dict[str, str]
    format: int = field(default=FORMAT)
    tokenizer_commit: str | None = None  # on the Hub, of a tokenizer that came from there

    def save(self, folder: Path) -> None:
        """Written last: a folder without it is not a prepared one."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def hub_ids(self) -> list[str]:
        """The data sets on the Hub that it was made from; none for local files."""
        identities = self.source_identity if isinstance(self.source_identity, list) else [self.source_identity]
        return [identity["id"] for identity in identities if "id" in identity]

    def tokens_per_byte(self, split: str) -> float:
        """Turns nats per token into nats per byte of the original text."""
        counts = self.splits[split]
        return counts.tokens / counts.bytes


def key_of(identity: Any, tokenizer_sha256: str, options: dict[str, Any]) -> str:
    """The data set's key: equal contents and options, equal key, whatever anything is called or where it lies."""
    parts = json.dumps([FORMAT, identity, tokenizer_sha256, options], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def source_name(config: Config) -> str:
    """What the recipe calls its source: for people, and to know whether it has to be read to be compared."""
    return " + ".join(map(_entry_name, config.data.entries()))


def _entry_name(entry: MixtureEntry) -> str:
    name = entry.source if isinstance(entry.source, str) else ", ".join(entry.source)
    parts = [name, entry.config_name and f"configuration {entry.config_name}"]
    return ", ".join(filter(None, [*parts, entry.revision and f"revision {entry.revision}"]))


def options_of(config: Config) -> dict[str, Any]:
    """What the recipe asks for, as the manifest records it."""
    options = {name: getattr(config.data, name) for name in OPTIONS}
    if config.data.mixture:
        entries = config.data.entries()
        options["mixture"] = [{"weight": entry.weight, "text_column": entry.text_column} for entry in entries]
        options["mixture_stop"] = config.data.mixture_stop
    return options


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
        values["left_out"] = LeftOut(**values["left_out"])
        values["splits"] = {name: SplitCounts(**counts) for name, counts in values["splits"].items()}
        manifest = Manifest(**values)
        _check_types(manifest)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove the folder and prepare again") from None


def _check_types(manifest: Manifest) -> None:
    """ValueError where what others count with is no number, so that an edited manifest is one message."""
    numbers = [file["bytes"] for file in manifest.files.values()]
    for counts in manifest.splits.values():
        numbers += [value for name, value in asdict(counts).items() if name != "shares"]
    wrong = [number for number in numbers if not isinstance(number, int)]
    wrong += [file["sha256"] for file in manifest.files.values() if not isinstance(file["sha256"], str)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} where a number or a check sum stood")


def check_fits(manifest: Manifest, config: Config, source_identity: Any, tokenizer_sha256: str) -> None:
    """Raises ConfigError with both values of everything in which prepared data differs from the recipe.

    Source and tokenizer are compared by contents: a renamed file is the same, one changed merge is another.
    """
    where = config.data.prepared_dir
    wanted = options_of(config)
    problems = [
        f"{where} was prepared with data.{name}={manifest.options.get(name)!r}, the recipe says {wanted.get(name)!r}"
        for name in wanted | manifest.options
        if manifest.options.get(name) != wanted.get(name)
    ]
    if manifest.source_identity != source_identity:
        problems.append(
            f"{where} was prepared from {manifest.source} with contents {_short(manifest.source_identity)}, "
            f"data.source={source_name(config)} has contents {_short(source_identity)}"
        )
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        problems.append(
            f"{where} was prepared with tokenizer {manifest.tokenizer} (sha256 {manifest.tokenizer_sha256[:12]}), "
            f"the tokenizer given has sha256 {tokenizer_sha256 if ' ' in tokenizer_sha256 else tokenizer_sha256[:12]}"
        )
    if problems:
        problems.append(
            "to have both, set another data.prepared_dir and prepare again; to replace it, remove the folder first"
        )
        raise ConfigError(problems)


def _short(identity: Any) -> str:
    """An identity with the start of every hash in it, which is enough to tell two apart; names stay whole."""
    if isinstance(identity, dict):
        return ", ".join(f"{key}: {_short(value)}" for key, value in identity.items())
    if isinstance(identity, list):
        return "[" + ", ".join(_short(value) for value in identity) + "]"
    return HASH.sub(lambda found: found[0][:12], str(identity))
