"""Tokenizers: loaded by name or trained on the text, identified by contents."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist import hub
from clm_dist.config import Config
from clm_dist.errors import UserError, nearest

END_OF_TEXT = "<|endoftext|>"  # GPT-2's own, so that the exported model looks familiar


# what transformers writes into a tokenizer's configuration of how it was loaded, not of what it is
HOW_LOADED = ("is_local", "local_files_only", "name_or_path")


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or Hub id. Where it has no eos_token its sep_token is that (BERT and its kin)."""
    from transformers import AutoTokenizer

    path = Path(name)
    if not path.exists() and (name.startswith((".", "/")) or name.count("/") > 1):  # no name on the Hub
        beside = [str(one) for one in path.parent.iterdir()] if path.parent.is_dir() else []
        known = nearest(str(path), beside)
        hint = known if known.startswith("; did you mean") else ""
        raise UserError(f"there is no tokenizer at {name}{hint}; give a folder with tokenizer.json, or a Hub id")
    try:
        where = hub.resolve_model(name, revision)
        tokenizer = AutoTokenizer.from_pretrained(name, **where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        remedy = "or give a folder with tokenizer.json as data.tokenizer"
        raise hub.refused(error, "model", name, revision, "the tokenizer", remedy) from None
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        # here and nowhere else, so that blocks, samples, the exported folder and its `generate` agree where a text ends
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def document_end(config: Config, tokenizer: Any) -> int | None:
    """The id that stands after each document; None where the recipe wants none. UserError where there is none."""
    if not config.data.append_eos:
        return None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.append_eos=true, but the tokenizer of {tokenizer_name(config)} has neither an eos_token nor a sep_token "
            "to end documents with; name one of its tokens as eos_token in its tokenizer_config.json, or set "
            "data.append_eos=false: then nothing stands between documents"
        )
    return int(tokenizer.eos_token_id)


def load_tokenizer_of(config: Config) -> Any:
    """The tokenizer that a recipe names: its own, or that of its model."""
    revision = config.model.revision if config.data.tokenizer is None else None
    return load_tokenizer(tokenizer_name(config), revision, config.model.trust_remote_code)


def tokenizer_name(config: Config) -> str:
    """What the recipe calls its tokenizer, for people and for the manifest."""
    if config.data.tokenizer_vocab_size is not None:
        return f"byte-level BPE of {config.data.tokenizer_vocab_size} trained on the training documents"
    return str(config.data.tokenizer or config.model.name)


def tokenizer_commit(config: Config) -> str | None:
    """The commit on the Hub that a recipe's tokenizer was loaded from; None for a folder or one that is trained."""
    if config.data.tokenizer_vocab_size is not None:
        return None
    revision = config.model.revision if config.data.tokenizer is None else None
    return hub.commit_of(tokenizer_name(config), revision, "tokenizer_config.json")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2) of at most `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is out of vocabulary
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what decides the ids, so that a renamed tokenizer is the same and one changed merge is another."""
    if tokenizer.is_fast:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        # of how it was last called, not of what it is: a file may ask for truncation, and our first call ends that
        contents = json.dumps({key: value for key, value in settings.items() if key not in ("truncation", "padding")})
        contents += str(getattr(tokenizer, "split_special_tokens", False))
    else:  # what decides its ids may stand in any of its files
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(tokenizer, Path(folder))
            contents = "".join(
                f"{path.name}{_hash(path)}" for path in sorted(Path(folder).rglob("*")) if path.is_file()
            )
    return hashlib.sha256(f"{contents}\0{tokenizer.eos_token_id}".encode()).hexdigest()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vocab_size(tokenizer: Any) -> int:
    """One more than the largest id: what an embedding needs. `len(tokenizer)` is less where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer that holds every id: 2 bytes a token up to 65,536 entries, 1 up to 256."""
    return np.min_scalar_type(vocab_size - 1)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer beside the blocks, so that training and export need nothing from elsewhere.

    The same files for the same tokenizer, wherever it came from, and small: indentation is more than half of them.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # `tokenizers` raises a bare Exception with the system's message, e.g. on a full disk
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            contents = json.loads(path.read_text(encoding="utf-8"))
            for key in HOW_LOADED:
                contents.pop(key, None)
            path.write_text(json.dumps(contents, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def token_ids(tokenizer: Any) -> dict[str, int | None]:
    """What a model from scratch has to know of its tokenizer, under the names of a model configuration."""
    return {
        "vocab_size": vocab_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
