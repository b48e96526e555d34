"""Training in two processes that pushes: to a Hub that is well, silent, or refuses the token midway; kills; secrets."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import execute, launch, prepare_recipe, run_command
from local_hub import TOKEN, Fault, LocalHub

pytestmark = [pytest.mark.distributed, pytest.mark.outside]

REPO = "someone/trained"
UPLOADED = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", "curves.png", "evaluation.json", "recipe.yaml", "report.html"),
}
PULL = """
import hashlib, sys
from pathlib import Path
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
name, revision = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(name, revision=revision)
AutoTokenizer.from_pretrained(name, revision=revision)
folder = Path(snapshot_download(name, revision=revision))
for path in sorted(folder.iterdir()):
    print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def environment(hub, folder, **more):
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return {**here, "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    publish = {"hub": {"repo": REPO, "when": "steps", "every_steps": 3, "timeout": 10, "wait_seconds": 60}}
    return prepare_recipe(tmp_path_factory.mktemp("push"), 120, publish=publish)


@pytest.fixture
def hub():
    with LocalHub({}, {}) as hub:
        yield hub
    assert set(hub.unknown) <= {"/api/agent-harnesses"}


def pushes(hub):
    return hub.repositories["model", REPO].commits[1:]


def assert_no_secret(folder: Path, *texts: str):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"hub.log", "config.yaml", "ledger.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [text for text in texts if TOKEN in text]


def test_every_three_steps_and_the_end_then_pulled_by_name(hub, recipe, tmp_path):
    """One process talks to the Hub at a time and it is never rank 1; what comes back is what was there."""
    run = tmp_path / "run"
    # each process tells the Hub which rank it is; a courier has none, for a launcher's variables are taken from it
    marker = tmp_path / "site"
    marker.mkdir()
    (marker / "sitecustomize.py").write_text(
        "import os\nos.environ['HF_HUB_USER_AGENT_ORIGIN'] = 'rank-' + os.environ.get('RANK', 'none')\n"
    )
    paths = os.pathsep.join([str(marker), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = environment(hub, tmp_path, PYTHONPATH=paths)
    done = launch(2, "train", recipe, f"run_dir={run}", env=env)
    assert done.code == 0, done.err
    assert f"publish: {REPO}, private, every 3 steps and at the end" in done.out
    ranks = {part for agent in hub.clients for part in agent.replace(";", " ").split() if "rank-" in part}
    assert ranks == {"origin/rank-0", "origin/rank-none"}, hub.clients
    repository = hub.repositories["model", REPO]
    first, last = pushes(hub)
    assert (first.title, last.title) == ("model of step 3", "model of step 6")
    assert repository.tags == {"step-3": first.sha, "step-6": last.sha}
    assert set(last.files) == UPLOADED | {".gitattributes"}
    assert first.files["model.safetensors"] != last.files["model.safetensors"]
    assert all(TOKEN.encode() not in content for content in last.files.values())
    pages = last.files["report.html"] + last.files["recipe.yaml"] + last.files["README.md"]
    assert str(tmp_path).encode() not in pages and str(recipe.parent).encode() not in pages
    assert_no_secret(run, done.out, done.err)
    assert not list((run / "outbox" / "hub").glob("[0-9]*"))

    pulled = execute([sys.executable, "-c", PULL, REPO, "step-6"], env=env)
    assert pulled.code == 0, pulled.err
    import hashlib

    expected = {name: hashlib.sha256(content).hexdigest() for name, content in last.files.items()}
    assert dict(line.split() for line in pulled.out.splitlines()) == expected
    assert expected["model.safetensors"] == hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


FAULTS = {
    "silence": Fault("POST .*/(commit|preupload)/", times=99, seconds=30),
    "resets": Fault("(PUT|POST) .*", times=999, reset=True),
    "a token that expires": Fault("POST .*/commit/", times=99, status=401),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=name, marks=() if name == "silence" else pytest.mark.soak)
        for name, fault in FAULTS.items()
    ],
)
def test_training_ends_by_itself_and_push_completes_later(hub, recipe, tmp_path, fault):
    run = tmp_path / "run"
    hub.faults.append(fault)
    env = environment(hub, tmp_path)
    settings = ("publish.hub.when=end", "publish.hub.every_steps=null", "publish.hub.wait_seconds=3")
    done = launch(2, "train", recipe, f"run_dir={run}", *settings, env=env)
    assert done.code == 0, done.err
    assert "clm-dist" in done.out and str(run) in done.out
    assert (run / "model" / "model.safetensors").is_file()
    assert ("model", REPO) not in hub.repositories or not pushes(hub)
    hub.faults.clear()
    pushed = run_command("push", run, env=env)
    assert pushed.code == 0, pushed.err
    [commit] = pushes(hub)
    assert set(commit.files) == UPLOADED | {".gitattributes"}
    assert f"pushed: model of step 6 is {REPO} at {commit.sha[:12]}" in pushed.out
    assert_no_secret(run, done.out, done.err, pushed.out, pushed.err)


def test_a_kill_in_the_midst_of_an_upload(hub, trained, tmp_path):
    """And messages for what only the user can mend."""
    env = environment(hub, tmp_path)
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", trained / "run", run], check=True)
    refused = run_command("push", run, env=env)
    assert refused.code == 2 and "give --repo owner/name" in refused.err
    refused = run_command("push", run, "--repo", REPO, env={**env, "HF_TOKEN": "hf_wrong"})
    assert refused.code == 2 and "refuses the token (401)" in refused.err

    hub.faults.append(Fault("PUT /lfs/", seconds=600, times=9))
    command = [sys.executable, "-m", "clm_dist", "push", str(run), "--repo", REPO]
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while hub.faults[0].times == 9 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and hub.faults[0].times < 9 and not pushes(hub)
    hub.faults.clear()
    for _ in range(2):
        done = run_command("push", run, "--repo", REPO, env=env)
        assert done.code == 0, done.err
        assert len(pushes(hub)) == 1
    card = pushes(hub)[0].files["README.md"].decode()
    facts = json.loads(pushes(hub)[0].files["evaluation.json"])
    assert f"| perplexity | {facts['metrics']['eval/perplexity']:.2f} |" in card
