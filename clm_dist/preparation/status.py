"""What of a `prepare` is done, what is missing, and who is at it."""

from pathlib import Path

from clm_dist.config import Config
from clm_dist.data.manifest import MANIFEST
from clm_dist.data.prepared import identity_of, open_prepared
from clm_dist.data.source import open_sources
from clm_dist.data.tokenize import load_tokenizer_of, tokenizer_sha256
from clm_dist.preparation.corpus import Corpus
from clm_dist.preparation.encoding import progress_of
from clm_dist.preparation.prepare import work_key
from clm_dist.preparation.work import WorkFolder

PARTS_SHOWN = 20


def status(config: Config) -> str:
    """The answer of `prepare --status`. Changes nothing."""
    target = Path(config.data.prepared_dir)
    if (target / MANIFEST).exists():
        open_prepared(config)
        return f"{target} is complete"
    work = WorkFolder(target)
    if not work.folder.exists():
        return f"{target}: nothing is done yet"
    corpus = Corpus(config.data, open_sources(config.data))
    tokenizer = None if config.data.tokenizer_vocab_size else load_tokenizer_of(config)
    sha256 = None if tokenizer is None else tokenizer_sha256(tokenizer)
    if work.key() != work_key(config, identity_of(corpus.sources), sha256):
        return f"{target}: what is done was done with other settings; prepare will begin anew"
    progress = progress_of(corpus, work)
    lines = [f"{target} is not complete: {progress}"]
    for part in progress.missing[:PARTS_SHOWN]:
        of = "an unknown number of" if part.chunks is None else part.chunks
        lines.append(f"  {part.name}: {part.done} of {of} chunks")
    if len(progress.missing) > PARTS_SHOWN:
        lines.append(f"  and {len(progress.missing) - PARTS_SHOWN} more")
    lines += [f"at work: {process}" for process in work.at_work()] or ["nobody is at work"]
    if not progress.missing:
        lines.append("all that is left is to put the parts together: the same command does it")
    return "\n".join(lines)
