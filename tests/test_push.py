"""The outbox and its delivery, with the real client against a local Hub whose every call can fail."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import recipe_values
from local_hub import READER, TOKEN, Fault, LocalHub, Repository

from clm_dist import recipe
from clm_dist.errors import RunError, UserError
from clm_dist.publish import hub_queue
from clm_dist.publish.hub import Hub, git_oid
from clm_dist.publish.hub_check import announcement, check_push
from clm_dist.training.publishing import queue_push

REPO = "someone/model"
CARD = b"---\nlanguage: en\n---\n\n# A model\n"
MODEL = {
    "config.json": b"{}", "generation_config.json": b"{}", "model.safetensors": b"weights of step 6",
    "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "README.md": CARD, "curves.png": b"\x89PNG",
}  # fmt: skip
UPLOADED = {*MODEL, "evaluation.json", "recipe.yaml", "report.html"}
FOREIGN = {"model.safetensors": b"of others", "model-00001-of-00002.safetensors": b"a shard", "notes.txt": b"kept"}


def write_model(run: Path, name: str = "model", step: int = 6, of: str = "this run", card: bytes = CARD) -> None:
    """An exported folder, with what must not leave it."""
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in {**MODEL, "README.md": card, "optimizer.pt": b"no", ".env": TOKEN.encode()}.items():
        (folder / file).unlink(missing_ok=True)  # an export is another file; what waits keeps the former
        (folder / file).write_bytes(content)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"weights of step %d" % step)
    facts = {"run": of, "step": step, "learned": f"hash at {step}", "card": git_oid(card)}
    (folder / "evaluation.json").write_text(json.dumps(facts))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a finished run, with a model in it. Its report is short: drawing takes longer than all the rest."""
    monkeypatch.setattr(hub_queue, "write_report", lambda run, output, recipe: output.write_text(recipe))
    folder = tmp_path / "run"
    write_model(folder)
    hub = {"repo": REPO, "timeout": 5}
    config = recipe.build(recipe_values(tmp_path, publish={"hub": hub}))
    (folder / "config.yaml").write_text(recipe.dump(config))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with nothing on it, which the client in this process talks to, with a token that may write."""
    from huggingface_hub import constants, file_download

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub({}, {}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # 0.36 copies it
        yield hub
    assert set(hub.unknown) <= {"/api/agent-harnesses"}  # huggingface_hub does without


def config_of(run, **hub):
    return recipe.load(run / "config.yaml", [f"publish.hub.{name}={value}" for name, value in hub.items()])


def put(run, what="model", **hub):
    return hub_queue.queue(run, run / what, what, config_of(run, **hub).publish.hub)


def deliver(run, said=None, **hub):
    assert Hub(run, config_of(run, **hub), (said if said is not None else []).append).deliver()


def pushes(hub):
    """The commits of the repository but its first."""
    return hub.repositories["model", REPO].commits[1:]


def test_one_commit_of_the_allowed_files_and_no_other(hub, run):
    put(run)
    deliver(run)
    [commit] = pushes(hub)
    repository = hub.repositories["model", REPO]
    assert set(commit.files) == UPLOADED | {".gitattributes"}
    for name in UPLOADED - {"recipe.yaml", "report.html"}:
        assert commit.files[name] == (run / "model" / name).read_bytes()
    assert (repository.private, repository.tags, commit.title) == (True, {"step-6": commit.sha}, "model of step 6")
    assert not hub_queue.waiting(run)
    pages = commit.files["recipe.yaml"] + commit.files["report.html"]
    assert b"run_dir: run\n" in pages and str(run.parent).encode() not in pages  # no place of this machine
    assert all(TOKEN.encode() not in content for content in commit.files.values())
    assert all(TOKEN.encode() not in one.read_bytes() for one in (run / "outbox").rglob("*") if one.is_file())

    put(run)  # once more
    deliver(run)
    assert len(pushes(hub)) == 1


def test_the_snapshot_is_of_its_moment(hub, run):
    """Training exports over the folder before the push gets through."""
    put(run)
    write_model(run, step=8)
    put(run)
    deliver(run)
    weights = [commit.files["model.safetensors"] for commit in pushes(hub)]
    assert weights == [b"weights of step 6", b"weights of step 8"]
    assert list(hub.repositories["model", REPO].tags) == ["step-6", "step-8"]


def test_what_was_not_written_whole_is_not_pushed(hub, run, monkeypatch):
    monkeypatch.setattr(hub_queue, "write_report", lambda *_, **__: 1 / 0)
    problem = queue_push(config_of(run), run / "model", "model")
    assert "ZeroDivisionError" in problem and "clm-dist push" in problem
    deliver(run)
    assert not hub.log


CALLS = {
    "look": f"GET /api/models/{REPO}$",
    "create": "POST /api/repos/create",
    "look again": f"GET /api/models/{REPO}/revision/main",
    "card": "POST /api/validate-yaml",
    "what is large": "POST .*/preupload/",
    "where to": "POST .*/objects/batch",
    "upload": "PUT /lfs/",
    "verify": "POST /lfs/.*/verify",
    "commit": "POST .*/commit/",
    "tag": "POST .*/tag/",
    "tags": "GET .*/refs",
}


BESIDE = {CALLS[name] for name in ("card", "upload", "verify")}  # which no token decides about


@pytest.mark.outside
@pytest.mark.parametrize("pattern", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}, {"lost": True}, {"status": 401}], ids=str)
def test_any_call_may_fail_and_there_is_one_commit(hub, run, monkeypatch, pattern, fault):
    """The client tries some calls again itself, at once here; what it gives up on, the next delivery completes."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    hub.faults.append(Fault(pattern, **fault))
    put(run)
    for _ in range(3):
        try:
            deliver(run)
            break
        except (RunError, UserError) as error:
            assert REPO in str(error)
            if pattern not in BESIDE:
                assert isinstance(error, UserError) == (fault.get("status") == 401)  # a token that expired
    assert hub.faults[0].times == 0, "the fault was never met"
    [commit] = pushes(hub)
    assert hub.repositories["model", REPO].tags == {"step-6": commit.sha}
    assert [row["commit"] for row in hub_queue.delivered(run)] == [commit.sha]


def test_a_commit_that_lands_long_after_its_time_is_not_made_twice(hub, run):
    """The server was slow: the reply is given up on, the next try finds nothing yet, and then the first one arrives."""
    hub.faults.append(Fault("POST .*/commit/", seconds=1.5))
    put(run)
    with pytest.raises(RunError, match="cannot reach"):
        deliver(run, timeout=0.5)
    deliver(run, timeout=5)
    deadline = time.monotonic() + 300
    while not any(line.endswith(" 412") for line in hub.log):  # the late one, of which the parent is not the newest now
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(pushes(hub)) == 1


@pytest.mark.outside
@pytest.mark.parametrize("call", ["look", "create", "upload", "commit", "tags"])
def test_silence_is_a_failed_call(hub, run, call):
    """The client alone would wait for ever in all but the uploads."""
    hub.faults.append(Fault(CALLS[call], seconds=600))
    put(run)
    for _ in range(2):
        try:
            deliver(run, timeout=0.5)
        except RunError as error:
            assert "cannot reach the Hub" in str(error)
    assert len(pushes(hub)) == 1


def test_a_kill_between_commit_and_note_does_not_double_it(hub, run, monkeypatch):
    put(run)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("clm_dist.publish.hub.note_delivered", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        deliver(run)
    deliver(run)
    assert len(pushes(hub)) == 1


def test_another_model_is_never_replaced_unasked(hub, run):
    hub.repositories["model", REPO] = Repository.of(FOREIGN, private=True)
    put(run)
    with pytest.raises(
        UserError, match=r"someone/model holds another model: not replaced; set publish.hub.replace=true"
    ):
        deliver(run)
    assert not pushes(hub)
    for item in hub_queue.waiting(run):
        hub_queue.change(run, replace(item, replace=True))
    deliver(run)
    [commit] = pushes(hub)
    assert set(commit.files) == UPLOADED | {"notes.txt"}  # a shard of the other model would be loaded with ours


def test_the_same_run_goes_on_in_its_repository(hub, run):
    """Whatever became of its notes: the repository itself says whose it is."""
    put(run)
    deliver(run)
    (run / hub_queue.NOTES).unlink()
    write_model(run, step=8)
    put(run)
    deliver(run)
    write_model(run, step=8, of="another run")
    put(run)
    with pytest.raises(UserError, match="another model"):
        deliver(run)
    assert len(pushes(hub)) == 2


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, run):
    put(run)
    deliver(run)
    repository = hub.repositories["model", REPO]
    edited = {**repository.files, "README.md": CARD + b"\nFor bakers.\n"}
    repository.commits.append(type(repository.commits[0])(edited, "edited", repository.commit))
    repository.branches["main"] = repository.commits[-1].sha
    for step in (8, 10):
        write_model(run, step=step, card=CARD + b"step %d" % step)
        put(run)
        deliver(run, said := [])
        assert "README.md of someone/model was written by others: kept" in said[0]
        assert repository.files["README.md"] == edited["README.md"]
        assert repository.files["model.safetensors"] == b"weights of step %d" % step


def test_front_matter_alone_is_no_card(hub, run):
    """What the Hub's page writes for a new repository with a licence."""
    hub.repositories["model", REPO] = Repository.of({"README.md": b"---\nlicense: mit\n---\n"}, private=True)
    put(run)
    deliver(run)
    assert pushes(hub)[0].files["README.md"] == CARD


def test_a_public_repository_is_not_given_what_was_to_be_private(hub, run):
    hub.repositories["model", REPO] = Repository.of({})
    put(run)
    with pytest.raises(UserError, match="is public"):
        deliver(run)
    assert not pushes(hub)


def test_a_branch_of_its_own(hub, run):
    put(run, branch="tried")
    deliver(run)
    repository = hub.repositories["model", REPO]
    assert set(repository.files) == {".gitattributes"}
    assert set(repository.at("tried").files) > UPLOADED


def test_only_the_newest_best_model_waits(run):
    for step in (2, 4, 6):
        write_model(run, "model_best", step)
        put(run, "model_best")
    put(run)
    assert [item.name for item in hub_queue.waiting(run)] == ["00000006-model", "00000006-model_best"]


def test_steps_that_come_again_after_a_restart_are_not_pushed_again(hub, run):
    config = config_of(run)
    assert queue_push(config, run / "model", "model") is None
    assert len(hub_queue.waiting(run)) == 1
    deliver(run)
    assert queue_push(config, run / "model", "model") is None
    assert not hub_queue.waiting(run)
    write_model(run, step=8)
    queue_push(config, run / "model", "model")
    assert [item.step for item in hub_queue.waiting(run)] == [8]


def test_one_process_delivers_at_a_time(hub, run):
    put(run)
    with hub_queue.delivering(run, wait=True), pytest.raises(RunError, match="another process is delivering"):
        deliver(run)
    deliver(run)


def test_copies_where_links_are_not_possible(run, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    item = put(run)
    for name, path in hub_queue.files_of(run, item).items():
        if name in MODEL:
            assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(MODEL[name]).digest()


# Before training: what can be known then


def settings(run, **hub):
    return config_of(run, **hub).publish.hub


def test_what_will_be_pushed_is_said(run):
    assert announcement(settings(run)) == "publish: someone/model, private, at the end"
    every = settings(run, when="steps", every_steps=5, private="false")
    assert announcement(every) == "publish: someone/model, public, every 5 steps and at the end"


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, REPO, "needs a token: set HF_TOKEN"),
        ("hf_wrong", REPO, r"refuses the token \(401\)"),
        (READER, "someone/new", "may only read"),
        (READER, "someone/there", r"may not do that .* \(403\)"),
        (TOKEN, "others/new", "cannot make one for others; choose one of someone"),
        (TOKEN, "someone/foreign", "holds another model"),
        (TOKEN, "someone/public", "is public"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_training(hub, run, monkeypatch, token, repo, message):
    hub.repositories["model", "someone/there"] = Repository.of({}, private=True)
    hub.repositories["model", "someone/foreign"] = Repository.of(FOREIGN, private=True)
    hub.repositories["model", "someone/public"] = Repository.of({})
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        check_push(settings(run, repo=repo), "this run")
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_a_push_that_can_work_changes_nothing_yet(hub, run):
    assert check_push(settings(run), None) is None
    assert not hub.repositories
    put(run)
    deliver(run)
    assert check_push(settings(run), "this run") is None
    assert check_push(settings(run, replace="true"), None) is None
    assert len(pushes(hub)) == 1


def test_what_cannot_be_asked_waits(hub, run, monkeypatch):
    from huggingface_hub import constants

    hub.faults.append(Fault("GET", status=503))
    assert "503" in check_push(settings(run), None)
    with LocalHub({}, {}) as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    assert "cannot reach the Hub" in check_push(settings(run), None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert check_push(settings(run), None) == "HF_HUB_OFFLINE=1"
