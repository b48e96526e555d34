"""What waits in the outbox to the Hugging Face Hub: one commit an item, never two.

Whether a commit is there is asked of the Hub before each attempt, never concluded from a reply: an upload whose reply was
lost, or that was killed, is either there (by the hash of every file) or it is not. The parent that a commit names keeps
two processes from committing the same.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_dist.config import Config
from clm_dist.errors import RunError, UserError
from clm_dist.hub import explain, limit_silence, status_of
from clm_dist.publish.hub_queue import (
    FACTS,
    OUTBOX,
    Item,
    body_of,
    delivering,
    files_of,
    is_weights,
    note_delivered,
    waiting,
)

CARD = "README.md"
# hf_xet tries for minutes without a word; who waits here tries again anyway
XET = {
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "500ms",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "10s",
}


@dataclass(frozen=True)
class Remote:
    """A branch as the Hub shows it."""

    commit: str | None
    files: dict[str, Any]  # by name: what the Hub says of it


class Hub:
    """The outbox's destination. say: how to tell what happens."""

    name = "hub"
    ended: str | None = None  # how training ended: whatever it was, what waits is to arrive

    def __init__(self, run: Path, config: Config, say: Callable[[str], None] = print) -> None:
        self.run, self.say, self.timeout = run, say, config.publish.hub.timeout
        for name, value in XET.items():
            os.environ.setdefault(name, value)
        limit_silence(self.timeout)
        from huggingface_hub import HfApi

        self.api = HfApi()

    def deliver(self) -> bool:
        """Sends what waits, the earliest first. UserError: will not be otherwise by itself; RunError: not now."""
        if not list((self.run / OUTBOX).glob("[0-9]*")):
            return True
        with delivering(self.run, wait=False) as ours:
            if not ours:
                raise RunError(f"another process is delivering {self.run / OUTBOX}")
            for item in waiting(self.run):
                self._deliver(item)
        return not waiting(self.run)

    def close(self) -> None:
        """Nothing is held between deliveries."""

    def missing(self) -> str | None:
        """What waits, in words; None: all has arrived."""
        left = waiting(self.run)
        if not left:
            return None
        what = f"{left[-1].what} of step {left[-1].step:,}"
        return f"{what} waits to be pushed" if len(left) == 1 else f"{len(left)} models wait to be pushed, up to {what}"

    def _deliver(self, item: Item) -> None:
        try:
            commit = self._commit(item)
            if item.tag is not None:
                self._tag(item, commit)
        except (UserError, RunError):
            raise
        except Exception as error:  # of several libraries; an error page of a proxy is a JSONDecodeError
            reason = explain(error, "model", item.repo, item.branch) or f"{error} ({type(error).__name__})"
            kind = UserError if _is_lasting(error) else RunError
            raise kind(f"push to {item.repo}: {reason}") from error
        note_delivered(self.run, item, commit)
        self.say(f"pushed: {item.what} of step {item.step:,} is {item.repo} at {commit[:12]}")

    def _commit(self, item: Item) -> str:
        """The commit that has all of an item's files: made now, or by an attempt of which nothing was heard."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

        if get_token() is None:
            raise UserError(f"push to {item.repo} needs a token: set HF_TOKEN (or `hf auth login`), and push again")
        files = files_of(self.run, item)
        for attempt in range(2):
            remote = self._look(item)
            wanted = self._without_kept_card(item, files, remote, told=attempt > 0)
            missing = [name for name, path in wanted.items() if not is_same(path, remote.files.get(name))]
            stale = [name for name in remote.files if is_weights(name) and name not in wanted]
            if not missing and not stale:
                return str(remote.commit)
            if attempt:
                break
            self._check_may_replace(item, remote)
            self.api.create_commit(
                item.repo,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(wanted[name])) for name in missing),
                    *(CommitOperationDelete(path_in_repo=name) for name in stale),
                ],
                commit_message=f"{item.what} of step {item.step}",
                revision=item.branch,
                parent_commit=remote.commit,
            )
        raise RunError(f"push to {item.repo}: the Hub does not show {', '.join(missing + stale)} as it was committed")

    def _look(self, item: Item) -> Remote:
        """The branch as it is; a repository or branch that is missing is made."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        is_there = True
        try:
            self.api.model_info(item.repo, timeout=self.timeout)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            is_there = False
        if not is_there:  # here, so that an error of it is none about a repository that is not found
            self.api.create_repo(item.repo, private=item.private, exist_ok=True)
        ask: dict[str, Any] = {"revision": item.branch, "files_metadata": True, "timeout": self.timeout}
        try:
            info = self.api.model_info(item.repo, **ask)
        except RevisionNotFoundError:
            self.api.create_branch(item.repo, branch=item.branch, exist_ok=True)
            info = self.api.model_info(item.repo, **ask)
        if item.private and info.private is False:
            raise UserError(public_problem(item.repo))
        return Remote(info.sha, {one.rfilename: one for one in info.siblings or []})

    def _check_may_replace(self, item: Item, remote: Remote) -> None:
        if item.replace or not any(map(is_weights, remote.files)):
            return
        if self._facts(item.repo, remote).get("run") != item.run:
            raise UserError(other_model_problem(item.repo))

    def _without_kept_card(self, item: Item, files: dict[str, Path], remote: Remote, told: bool) -> dict[str, Path]:
        """What is to be uploaded: all, but for the card where somebody wrote into the one on the Hub."""
        there = remote.files.get(CARD)
        if there is None or is_same(files[CARD], there):
            return files
        facts = self._facts(item.repo, remote)
        if facts.get("run") not in (None, item.run) and item.replace:
            return files  # the card of the model that is replaced
        if facts.get("card") == there.blob_id or not body_of(self._read(item.repo, remote, CARD)):
            return files  # as we left it; or front matter alone, as a new repository may have
        if not told:
            self.say(f"{CARD} of {item.repo} was written by others: kept; the new card is in {self.run}/{item.what}")
        return {name: path for name, path in files.items() if name != CARD}

    def _facts(self, repo: str, remote: Remote) -> dict[str, Any]:
        return remote_facts(self.api, repo, remote.commit, remote.files)

    def _read(self, repo: str, remote: Remote, name: str) -> str:
        return _read(self.api, repo, remote.commit, name)

    def _tag(self, item: Item, commit: str) -> None:
        """Tags a commit; a tag of that name on another one is moved only where a model may be replaced."""
        assert item.tag is not None
        tags = {one.name: one.target_commit for one in self.api.list_repo_refs(item.repo).tags}
        if tags.get(item.tag) not in (None, commit):
            if not item.replace:
                self.say(f"tag {item.tag} of {item.repo} is at another commit: left there")
                return
            self.api.delete_tag(item.repo, tag=item.tag)
        if tags.get(item.tag) != commit:
            self.api.create_tag(item.repo, tag=item.tag, revision=commit, exist_ok=True)


def is_same(path: Path, there: Any) -> bool:
    """Whether a local file is the one that the Hub shows, by its hash: SHA-256 of large files, git's of the others."""
    if there is None or (there.size is not None and there.size != path.stat().st_size):
        return False
    if there.lfs is not None:
        with path.open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256)
    return git_oid(path.read_bytes()) == there.blob_id


def git_oid(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def remote_facts(api: Any, repo: str, commit: str | None, files: Any) -> dict[str, Any]:
    """evaluation.json of a repository: which run its model is of. Nothing where that is not told."""
    if FACTS not in files:
        return {}
    try:
        facts = json.loads(_read(api, repo, commit, FACTS))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def other_model_problem(repo: str) -> str:
    """What is said of a repository that holds the model of another run, or of somebody."""
    return (
        f"{repo} holds another model: not replaced; set publish.hub.replace=true (push: --replace) to commit over it, or "
        "choose another publish.hub.repo"
    )


def public_problem(repo: str) -> str:
    """What is said of a repository that all can see, where a private one was asked for."""
    return (
        f"{repo} is public, and publish.hub.private=true; set publish.hub.private=false (push: --public) if all may see "
        "the model, or choose another publish.hub.repo"
    )


def _read(api: Any, repo: str, commit: str | None, name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo, name, revision=commit, local_dir=folder)
        return Path(path).read_text(encoding="utf-8")


def _is_lasting(error: BaseException) -> bool:
    """Whether only the user can change it: a wrong token, a permission, a name."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    status = status_of(error)
    if status is not None:
        return status in (400, 401, 403, 404)
    return isinstance(error, (OfflineModeIsEnabled, HFValidationError))
