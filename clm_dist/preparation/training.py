"""A tokenizer trained on the training documents, once, and kept with the work."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.config import DataConfig
from clm_dist.data import tokenize
from clm_dist.data.split import document_key, held_out_below
from clm_dist.errors import UserError
from clm_dist.preparation.corpus import Corpus
from clm_dist.preparation.work import WorkFolder
from clm_dist.progress import progress

KEYS_AT_ONCE = 2**16


def trained_tokenizer(config: DataConfig, corpus: Corpus, work: WorkFolder) -> Any:
    """The tokenizer of an earlier start of the same work, or a new one.

    The text is read twice: once to know which documents are held out (and to find broken records at once), once to train
    on the others.
    """
    if not work.tokenizer.exists():
        assert config.tokenizer_vocab_size is not None
        keys = _write_keys(config, corpus, work.folder / "keys")
        bound = held_out_below(lambda: _read_keys(keys), config.eval_fraction or 0)
        keys.unlink()
        texts = (text for text in corpus.texts(config.train_split) if _key(text, config) >= bound)
        trained = tokenize.train_tokenizer(texts, config.tokenizer_vocab_size)
        partial = work.tokenizer.with_name("tokenizer.partial")
        tokenize.save_tokenizer(trained, partial)
        partial.rename(work.tokenizer)
    return tokenize.load_tokenizer(str(work.tokenizer))


def _key(text: str, config: DataConfig) -> int:
    return document_key(text.encode("utf-8"), config.split_seed)


def _write_keys(config: DataConfig, corpus: Corpus, path: Path) -> Path:
    """The keys of the training documents in a file: there may be more than fit into memory."""
    texts = iter(progress(corpus.texts(config.train_split), "reading", "documents"))
    with path.open("wb") as file:
        while batch := [_key(text, config) for text in islice(texts, KEYS_AT_ONCE)]:
            file.write(np.array(batch, dtype=np.uint64).tobytes())
    if not path.stat().st_size:
        raise UserError(
            f"data.source={config.entries()[0].source} holds no text in column {config.entries()[0].text_column} to train "
            "a tokenizer on; check data.source and data.text_column"
        )
    return path


def _read_keys(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while data := file.read(8 * KEYS_AT_ONCE):
            yield np.frombuffer(data, dtype=np.uint64)
