"""The Hugging Face Hub by name: which commit a name means now, and what its refusals mean. Imports nothing on import."""

import os
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from clm_dist.errors import UserError

Kind = Literal["model", "dataset"]
CALLED = {"model": "model", "dataset": "data set"}
TIMEOUT = 10  # seconds that the Hub may be silent when it is only asked for a commit
CONNECTIONS = ("httpx", "urllib3")  # whose errors are of a connection: under huggingface_hub 2, and under 0.36


def resolve(kind: Kind, name: str, revision: str | None = None) -> str | None:
    """The commit that `revision` (or the default branch) of a name on the Hub is now; UserError where there is none.

    One call without retries, so that what cannot be is said at once. None with HF_HUB_OFFLINE=1.
    """
    token = os.environ.get("HF_TOKEN", "")
    return _resolve(kind, name, revision, token)


@cache
def _resolve(kind: Kind, name: str, revision: str | None, token: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        return ask(name, revision=revision, timeout=TIMEOUT).sha
    except OfflineModeIsEnabled:
        return None


def resolve_model(name: str, revision: str | None = None) -> dict[str, Any]:
    """What to give `from_pretrained` beside the name; raises what the Hub says to it.

    Where the Hub cannot be reached, it takes what was fetched before, at once: transformers would ask for each file five
    times first. The revision stays as it is given: the cache would not find what was fetched by a commit under "main".
    """
    if Path(name).exists():
        return {}
    try:
        resolve("model", name, revision)
        return {"revision": revision}
    except Exception as error:
        if not is_unreachable(error):
            raise
        return {"revision": revision, "local_files_only": True}


def check_name(name: str | None, setting: str, remedy: str) -> None:
    """Refuses at once what is no folder and cannot be a name on the Hub. setting: where it stands."""
    if name and not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UserError(f"{setting}={name}: {_no_folder(name)}; {remedy}")


def commit_of(name: str, revision: str | None, file: str) -> str | None:
    """The commit on the Hub that a model was just loaded from, by a file of it in the cache; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).exists():
        return None
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def is_unreachable(error: BaseException) -> bool:
    """Whether nobody answered: no route, no name, a refusal of the connection, silence."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = _chain(error)
    if _answers(chain) or any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return False
    return any(
        isinstance(one, (ConnectionError, TimeoutError)) or type(one).__module__.split(".")[0].startswith(CONNECTIONS)
        for one in chain
    )


def status_of(error: BaseException) -> int | None:
    """The status with which the Hub refused; None where it did not answer, or none is told."""
    answers = _answers([error])
    return answers[-1] if answers else None


def limit_silence(seconds: float) -> None:
    """Makes calls of huggingface_hub fail that get no answer: by default most of them wait for ever."""
    import huggingface_hub

    client: Any = huggingface_hub.get_session()
    if hasattr(huggingface_hub, "set_client_factory"):  # httpx
        kind, hooks = type(client), client.event_hooks
        huggingface_hub.set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))
    else:  # huggingface_hub 0.36: requests, of which only what sends knows a default
        huggingface_hub.configure_http_backend(lambda: _impatient(client, seconds))


def _impatient(client: Any, seconds: float) -> Any:
    """A session of requests as `client`, that waits so long unless a call says how long."""
    session = type(client)()
    for start, sender in client.adapters.items():
        adapter = type(sender)()
        adapter.send = partial(_send, adapter.send, seconds)
        session.mount(start, adapter)
    return session


def _send(send: Any, seconds: float, request: Any, *, timeout: Any = None, **options: Any) -> Any:
    return send(request, timeout=seconds if timeout is None else timeout, **options)


def explain(error: BaseException, kind: Kind, name: str, revision: str | None = None) -> str | None:
    """What an error of the Hub's libraries means and what to do; None where it is not about the Hub.

    The libraries wrap their errors in others, some of which say nothing: the innermost that is known speaks.
    """
    from huggingface_hub import errors

    what = f"{CALLED[kind]} {name}"
    chain = _chain(error)

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    answers = _answers(chain)
    status = answers[-1] if answers else None
    if met(errors.HFValidationError):
        return _no_folder(name)
    if met(errors.GatedRepoError) or "is a gated dataset" in str(error):  # `datasets` hides the former
        said = f" ({status})" if status else ""
        return f"the {what} is gated{said}: ask for access on its page, and set HF_TOKEN of the account that has it"
    if met(errors.RevisionNotFoundError):
        return f"the {what} has no revision {revision}; check it, or leave it out for the newest"
    if met(errors.RepositoryNotFoundError):
        known = (
            "and your token (HF_TOKEN) may not see it" if _has_token() else "or it is private and HF_TOKEN is not set"
        )
        return f"the Hub shows no {what} ({status}): there is none, {known}; check the name and the token"
    if met(errors.EntryNotFoundError) and not met(errors.LocalEntryNotFoundError):
        return f"the {what} lacks a file that is needed ({_first_line(error)}); check that it is whole"
    if status == 401:
        return f"the Hub refuses the token (401) for the {what}: wrong or expired; set HF_TOKEN to a valid one"
    if status == 403:
        return f"the token (HF_TOKEN) may not do that with the {what} (403): give it that permission, or take another"
    if met(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE=1" if met(errors.OfflineModeIsEnabled) else f"the Hub at {_endpoint()} cannot be reached"
        return f"{why}, and the {what} is not in the cache (HF_HOME); fetch it once where there is a route"
    if status is not None and (status == 429 or status >= 500):
        return f"the Hub answers {status} for the {what}: not now; try again later"
    if status is not None:
        return f"the Hub refuses ({status}) for the {what}: {_first_line(error)}"
    if is_unreachable(error):
        return (
            f"cannot reach the Hub at {_endpoint()} for the {what} ({_first_line(chain[-1])}); check the connection, or "
            "set HF_HUB_OFFLINE=1 to use what was fetched before"
        )
    if any("Consistency check failed" in str(one) for one in chain):
        return f"the download of the {what} broke off; the same command goes on with it"
    return None


def refused(error: BaseException, kind: Kind, name: str, revision: str | None, setting: str, remedy: str) -> UserError:
    """The one message about something that cannot be loaded by name. setting: where the name stood."""
    reason = explain(error, kind, name, revision)
    if reason is not None:
        return UserError(f"{setting}={name}: {reason}; {remedy}")
    told = " ".join(str(error.__cause__ or error).split())[:300].rstrip(".")
    return UserError(f"cannot load {setting}={name}: {told}; {remedy}")


def _no_folder(name: str) -> str:
    return f"there is no folder {name}, and a name on the Hub is written owner/name; check the path"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from, outermost first."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found


def _answers(chain: list[BaseException]) -> list[int]:
    """The statuses of the Hub's refusals. huggingface_hub 0.36 has errors of that kind without an answer, too."""
    from huggingface_hub.errors import HfHubHTTPError

    answers = [getattr(one, "response", None) for one in chain if isinstance(one, HfHubHTTPError)]
    return [answer.status_code for answer in answers if answer is not None]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
