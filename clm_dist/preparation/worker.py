"""A worker of `prepare`: a process that is given chunks and leaves units. Imports neither torch nor transformers."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.data.records import Bad, BadRecordError, Chunk, texts_of
from clm_dist.data.split import document_digest, document_key
from clm_dist.errors import UserError
from clm_dist.preparation.encode import Choice
from clm_dist.preparation.encoders import DifferentIdsError, Encoder
from clm_dist.preparation.units import Unit


@dataclass(frozen=True)
class Task:
    """What is the same for all chunks."""

    choice: Choice
    eos_token_id: int | None  # appended to every document, if any
    separator: str
    split_seed: int
    deduplicate: bool
    stop_on_error: bool


@dataclass(frozen=True)
class Job:
    """One chunk, and where its unit goes."""

    chunk: Chunk
    column: str
    unit: Path


@dataclass(frozen=True)
class Done:
    """What is told about a job that was done. Where `bad` stands no unit was left."""

    job_number: int
    tokens: int
    bad: Bad | None = None


def do(job: Job, number: int, task: Task, encoder: Encoder) -> Done:
    """Chunk to unit."""
    try:
        return _done(job, number, task, encoder, None)
    except (OSError, MemoryError, UserError, DifferentIdsError):
        raise
    except Exception:  # of a tokenizer with no token for a sign, and none for what is unknown: look at each text alone
        return _done(job, number, task, encoder, partial(_refuse, encoder))


def _done(job: Job, number: int, task: Task, encoder: Encoder, refuse: Callable[[str], None] | None) -> Done:
    texts: list[str] = []
    bad: list[Bad] = []
    empty = 0
    for text in texts_of(job.chunk, job.column, task.separator, refuse):
        if isinstance(text, Bad):
            if task.stop_on_error:
                return Done(number, 0, text)
            bad.append(text)
        elif not text or text.isspace():
            empty += 1
        else:
            texts.append(text)
    unit = make_unit(texts, empty, bad, task, encoder)
    unit.save(job.unit)
    return Done(number, len(unit.ids))


def _refuse(encoder: Encoder, text: str) -> None:
    """BadRecordError where the tokenizer does not take a text."""
    try:
        encoder.encode([text])
    except DifferentIdsError:
        raise
    except Exception as error:
        raise BadRecordError(
            f"the tokenizer cannot encode it ({error}); take one that knows all bytes or an unknown token, or remove it"
        ) from None


def make_unit(texts: list[str], empty: int, bad: list[Bad], task: Task, encoder: Encoder) -> Unit:
    """Tokenises documents."""
    ids, lengths = encoder.encode(texts)
    encoded = [text.encode("utf-8") for text in texts]
    keys = _array((document_key(text, task.split_seed) for text in encoded), np.uint64)
    digests = _array((document_digest(text) for text in encoded) if task.deduplicate else (), np.uint64)
    sizes = _array(map(len, encoded), np.int64)
    filled = lengths > 0  # a tokenizer may drop all there is, e.g. control characters
    if not filled.all():
        empty += int((~filled).sum())
        lengths, keys, sizes = lengths[filled], keys[filled], sizes[filled]
        digests = digests[filled] if task.deduplicate else digests
    if task.eos_token_id is not None:
        ids = np.insert(ids, np.cumsum(lengths), task.eos_token_id)
        lengths = lengths + 1
    return Unit(ids, lengths, sizes, keys, digests, empty, bad)


def _array(values: Iterable[int], dtype: Any) -> np.ndarray:
    return np.fromiter(values, dtype=dtype)


def main() -> None:
    """Does jobs until the other end is closed, as it also is when that process dies."""
    connection = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    try:
        task: Task = connection.recv()
        encoder = task.choice.build()
        while True:
            number, job = connection.recv()
            try:
                connection.send(do(job, number, task, encoder))
            except (OSError, UserError, DifferentIdsError) as error:  # a full disk, a file that went away
                connection.send(error)
            except Exception:
                connection.send(traceback.format_exc())
    except (EOFError, OSError):  # the other end is gone, perhaps in the midst of a message
        os._exit(0)
