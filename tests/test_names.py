"""What the Hub says to a name is one message with what to do, the same for models, tokenizers and data sets."""

import time

import pytest
from local_hub import READER, TOKEN, Fault, LocalHub, write_data, write_model

from clm_dist import hub as names
from clm_dist.config import MixtureEntry
from clm_dist.data.hub_source import HubSource
from clm_dist.data.tokenize import load_tokenizer
from clm_dist.errors import UserError
from clm_dist.model.build import load_model
from clm_dist.model.configuration import load_configuration

OPEN, PRIVATE, GATED = "someone/open", "someone/private", "someone/gated"
LOADS = {
    "model": load_configuration,
    "weights": lambda name, revision=None: load_model(name, None, revision),
    "tokenizer": load_tokenizer,
    "data": lambda name, revision=None: (
        HubSource(MixtureEntry(source=name, revision=revision, weight=1), ["train"], False).splits
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    write_model(folder / "model")
    write_data(folder / "data")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path, folders):
    """The libraries of this process talk to it, with an empty cache and no token."""
    import datasets
    from huggingface_hub import constants, file_download
    from transformers.utils import hub as transformers_hub

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    cache = str(tmp_path / "cache")
    settings = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": cache,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers_hub, "TRANSFORMERS_CACHE", cache, raising=False)  # 4.57 copies it
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    models = dict.fromkeys((OPEN, PRIVATE, GATED), folders / "model")
    data = dict.fromkeys((OPEN, PRIVATE, GATED), folders / "data")
    with LocalHub(models, data, private=[PRIVATE], gated=[GATED]) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # 0.36 copies it
        names._resolve.cache_clear()
        yield hub


CASES = {
    "no such name": ("someone/none", None, None, "there is none, or it is private and HF_TOKEN is not set"),
    "no such name, with a token": (
        "someone/none",
        TOKEN,
        None,
        "there is none, and your token (HF_TOKEN) may not see it",
    ),
    "private": (PRIVATE, None, None, "(401): there is none, or it is private"),
    "a wrong token": (OPEN, "hf_wrong", None, "refuses the token (401)"),
    "no such revision": (OPEN, None, "v9", "has no revision v9"),
    "gated": (GATED, READER, None, ": ask for access on its page, and set HF_TOKEN"),
}


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize(("name", "token", "revision", "message"), CASES.values(), ids=CASES)
def test_a_refusal_is_one_message(hub, monkeypatch, kind, name, token, revision, message):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as caught:
        LOADS[kind](name, revision)
    assert message in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("kind", LOADS)
def test_nobody_there_is_said_at_once(hub, monkeypatch, kind):
    """transformers alone asks for each file five times, with growing pauses: half a minute."""
    hub.__exit__()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits for another try"))
    with pytest.raises(UserError, match=r"cannot be reached|cannot reach the Hub"):
        LOADS[kind](OPEN)


def test_what_is_in_the_cache_serves_when_nobody_is_there(hub):
    commit = hub.repositories["model", OPEN].commit
    load_configuration(OPEN)
    load_tokenizer(OPEN)
    for file in ("config.json", "tokenizer_config.json"):
        assert names.commit_of(OPEN, None, file) == commit
    hub.__exit__()
    names._resolve.cache_clear()
    assert load_configuration(OPEN).n_embd == 32


def test_a_download_that_is_cut(hub, monkeypatch):
    """In the midst of the weights, every time."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    hub.faults.append(Fault("GET /stored/", times=99, cut=5000))
    with pytest.raises(UserError) as caught:
        load_model(OPEN)
    assert OPEN in str(caught.value)
    hub.faults.clear()
    assert load_model(OPEN) is not None


def test_a_hub_that_is_ill(hub):
    hub.faults.append(Fault("GET", times=99, status=503))
    with pytest.raises(UserError, match=r"answers 503 .* try again later"):
        load_configuration(OPEN)
