"""Whether a push can work, before there is anything to push. What cannot be asked now waits."""

import os
from typing import Any

from clm_dist.config import HubConfig
from clm_dist.errors import UserError
from clm_dist.hub import explain, is_unreachable, limit_silence, status_of
from clm_dist.publish.hub import other_model_problem, public_problem, remote_facts
from clm_dist.publish.hub_queue import is_weights

PATIENCE = 10  # seconds that the Hub may be silent here: training is to begin


def announcement(hub: HubConfig) -> str:
    """What will be pushed where, and who will see it."""
    when = {"end": "at the end", "best": "each best model", "steps": f"every {hub.every_steps} steps and at the end"}
    return f"publish: {hub.repo}, {'private' if hub.private else 'public'}, {when[hub.when]}"


def check_push(hub: HubConfig, run: str | None) -> str | None:
    """UserError where a push cannot work; else what could not be asked. run: the run that goes on, if one does.

    On one process. create_repo succeeds with a token that may only read, if the repository is there: whether it may write
    is asked by beginning an upload.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        from huggingface_hub import get_token

        return "HF_HUB_OFFLINE=1" + ("" if get_token() else ", and there is no token to push with: set HF_TOKEN")
    limit_silence(PATIENCE)
    repo = str(hub.repo)
    try:
        _check(hub, repo, run)
    except UserError:
        raise
    except Exception as error:
        reason = explain(error, "model", repo, hub.branch) or str(error)
        status = status_of(error) or 0
        if is_unreachable(error) or status == 429 or status >= 500:
            return reason
        raise UserError(f"publish.hub.repo={repo}: {reason}") from None
    return None


def _check(hub: HubConfig, repo: str, run: str | None) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    if get_token() is None:
        _ask_anonymously(api, repo)
        raise UserError(
            f"publish.hub.repo={repo} needs a token: set HF_TOKEN (or `hf auth login`), or leave publish.hub.repo out and "
            "push later by `clm-dist push`"
        )
    account = api.whoami()
    try:
        info = api.model_info(repo, files_metadata=True, timeout=PATIENCE)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        _check_may_create(account, repo)
        return
    if hub.private and info.private is False:
        raise UserError(public_problem(repo))
    # uploads nothing: small files travel with the commit, and there is none
    api.preupload_lfs_files(repo, [CommitOperationAdd(path_in_repo="config.json", path_or_fileobj=b"{}")])
    try:
        info = api.model_info(repo, revision=hub.branch, files_metadata=True, timeout=PATIENCE)
    except RevisionNotFoundError:
        return
    files = [one.rfilename for one in info.siblings or []]
    if hub.replace or not any(map(is_weights, files)):
        return
    if run is None or remote_facts(api, repo, info.sha, files).get("run") != run:
        raise UserError(other_model_problem(repo))


def _ask_anonymously(api: Any, repo: str) -> None:
    """Raises where nobody answers: then the token may come later, too."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.model_info(repo, token=False, timeout=PATIENCE)
    except HfHubHTTPError as error:
        if (status_of(error) or 0) >= 500:
            raise


def _check_may_create(account: dict[str, Any], repo: str) -> None:
    """UserError where whoami says that a repository cannot be made."""
    owner = repo.split("/")[0]
    mine = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    if owner not in mine:
        raise UserError(
            f"publish.hub.repo={repo}: there is no such repository that your token may see, and it cannot make one for "
            f"{owner}; choose one of {', '.join(mine)} as owner"
        )
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"publish.hub.repo={repo}: the token (HF_TOKEN) may only read; make one with the permission to write"
        )
