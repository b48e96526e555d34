"""The commands with names on the Hub, against a local stand-in: what is pinned, refused and kept secret.

Each command is a process of its own: the libraries read HF_ENDPOINT and HF_HOME when they are imported.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Result, execute, read_rows, run_command
from local_hub import TOKEN, LocalHub, write_data, write_model

DATA, MODEL = "dany0407/eli5_category", "distilbert/distilgpt2"  # those that the recipe names
PRIVATE, PICKLED = "someone/private", "someone/pickled"
DAMAGED, NOTHING = "someone/damaged", "someone/nothing"
PUSHED, PUSHED_DATA = "someone/eli5", "someone/answers"
RECIPE = ROOT / "recipes" / "eli5_distilgpt2.yaml"
SMALL = (
    *("run_dir=run", "data.prepared_dir=prepared", "data.block_size=32"),
    *("train.max_steps=3", "train.epochs=null", "generate.max_new_tokens=5"),
)
DISPENSABLE = "/api/agent-harnesses"  # huggingface_hub asks for it at most once a day, and does without


@dataclass(frozen=True)
class Workplace:
    """A folder to work in, and the Hub."""

    folder: Path
    hub: LocalHub

    def run(self, command: str, *arguments: str | Path, **environment: str) -> Result:
        """`clm-dist COMMAND`, which may ask the Hub only for what the stand-in knows."""
        self.hub.unknown.clear()
        here = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "NO_PROXY": "127.0.0.1"}
        here |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        result = run_command(command, *arguments, cwd=self.folder, env={**here, **environment})
        unexpected = set(self.hub.unknown) - {DISPENSABLE}
        assert not unexpected, f"{command} asked the Hub for {unexpected}\n{result.err}"
        return result

    def run_recipe(self, command: str, *overrides: str, **environment: str) -> Result:
        return self.run(command, RECIPE, *SMALL, *overrides, **environment)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Hub with what the recipe names, a private data set, a trapped pickle and damaged files."""
    import torch

    folder = tmp_path_factory.mktemp("hub")
    data, model, pickled, no_data, no_model, work = (folder / str(number) for number in range(6))
    write_data(data)
    write_model(model)

    shutil.copytree(model, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Trap(folder / "sprung")}, pickled / "pytorch_model.bin")
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    (folder / "sprung").unlink()  # the trap works

    no_data.mkdir()
    (no_data / "train.jsonl").write_text('{"answers": {"text": ["one"]}}\n{"answers": \n')
    shutil.copytree(model, no_model)
    (no_model / "model.safetensors").write_bytes(b"<html>")

    models = {MODEL: model, PICKLED: pickled, DAMAGED: no_model}
    datasets = {DATA: data, PRIVATE: data, DAMAGED: no_data}
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
            patch.delenv(name)  # whoever runs the tests may have a token and caches
        with LocalHub(models, datasets, private=[PRIVATE]) as hub:
            yield Workplace(work, hub)


PUSH = """
import json, sys
from datasets import Dataset, load_dataset
name, source = sys.argv[1:]
rows = Dataset.from_list([json.loads(line) for line in open(source)])
rows.push_to_hub(name, split="train", private=True)
there = load_dataset(name, split="train", download_mode="force_redownload")
assert there[:] == rows[:], "what was pulled is not what was pushed"
"""


@pytest.fixture(scope="module")
def prepared(place):
    """The recipe's data prepared in `place`; what the command said."""
    result = place.run_recipe("prepare")
    assert result.code == 0, result.err
    return result


@pytest.fixture
def target(tmp_path):
    """A folder that a refused command was to write, and did not, nor anything beside it."""
    yield tmp_path / "target"
    assert not list(tmp_path.iterdir())


def assert_refused(result: Result, named: str) -> None:
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert named in result.err


def test_prepare_records_the_commit_of_the_data_set(place, prepared):
    manifest = json.loads((place.folder / "prepared" / "manifest.json").read_text())
    assert manifest["source_identity"]["revision"] == place.hub.repositories["dataset", DATA].commit
    documents = {name: counts["documents"] for name, counts in manifest["splits"].items()}
    assert documents == {"train": 48, "eval": 12}  # of 60, a fifth held out


def test_prepare_shows_no_progress_bar_of_a_library(prepared):
    assert "examples/s" not in prepared.err


def test_prepare_again_is_a_no_op(place, prepared):
    again = place.run_recipe("prepare")
    assert (again.code, again.out.split(",")[0]) == (0, "already prepared"), again.err


def test_prepare_again_is_a_no_op_without_the_hub(place, prepared):
    """As on a compute node: what was fetched is known to be what was prepared."""
    again = place.run_recipe("prepare", HF_HUB_OFFLINE="1")
    assert (again.code, again.out.split(",")[0]) == (0, "already prepared"), again.err


def test_without_the_hub_another_commit_is_refused(place, prepared, target):
    """`datasets` gives the newest cached copy, whatever commit was asked for."""
    other = ("data.revision=" + "0" * 40, f"data.prepared_dir={target}")
    assert_refused(place.run_recipe("prepare", *other, HF_HUB_OFFLINE="1"), DATA)


@pytest.mark.outside
def test_the_whole_journey_by_name(place, prepared):
    """Load, prepare, train, evaluate, push, pull, evaluate again, generate: the recipe as it is shipped, but smaller."""
    trained = place.run_recipe("train", f"publish.hub.repo={PUSHED}", HF_TOKEN=TOKEN)
    assert trained.code == 0, trained.err
    run, hub = place.folder / "run", place.hub
    before = next(row for row in read_rows(run / "metrics.jsonl") if "eval/loss" in row)
    assert before["step"] == 0
    measured = place.run_recipe("evaluate", "--model", MODEL, "--output", "hub.json")
    assert measured.code == 0, measured.err
    of_the_hub = json.loads((place.folder / "hub.json").read_text())
    assert of_the_hub["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-6)  # trained from those weights
    commits = {kind: hub.repositories[key].commit for key, kind in ((("model", MODEL), "m"), (("dataset", DATA), "d"))}
    assert json.loads((run / "environment.json").read_text())["base_model_commit"] == commits["m"]
    assert json.loads((place.folder / "prepared" / "manifest.json").read_text())["tokenizer_commit"] == commits["m"]

    [_, pushed] = hub.repositories["model", PUSHED].commits
    assert pushed.files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    card = pushed.files["README.md"].decode()
    assert f"from {MODEL} at commit `{commits['m']}`" in card and f"- {DATA}" in card

    fresh = {"HF_TOKEN": TOKEN, "HF_HOME": str(place.folder / "elsewhere")}
    pulled = place.run_recipe("evaluate", "--model", PUSHED, "--revision", "step-3", "--output", "pulled.json", **fresh)
    assert pulled.code == 0, pulled.err
    last = [row for row in read_rows(run / "metrics.jsonl") if "eval/loss" in row][-1]
    assert json.loads((place.folder / "pulled.json").read_text())["eval/loss"] == pytest.approx(
        last["eval/loss"], rel=1e-6
    )
    text = place.run("generate", PUSHED, "--prompt", "The sky is", "generate.max_new_tokens=5", **fresh)
    assert text.code == 0, text.err
    assert text.out.startswith("The sky is") and len(text.out.strip()) > len("The sky is")


@pytest.mark.outside
def test_a_data_set_that_datasets_pushed_is_what_is_prepared(place, tmp_path):
    """Parquet by the real client, there and back; then by name: the same blocks as from the file that it came from."""
    source = tmp_path / "answers.jsonl"
    source.write_text(
        "".join(json.dumps({"answers": {"text": [f"Answer {n} is long."] * 9}}) + "\n" for n in range(90))
    )
    environment = {"HF_ENDPOINT": place.hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    pushed = execute([sys.executable, "-c", PUSH, PUSHED_DATA, str(source)], env=environment)
    assert pushed.code == 0, pushed.err
    files = place.hub.repositories["dataset", PUSHED_DATA].files
    [parquet] = [content for name, content in files.items() if name.endswith(".parquet")]
    assert sorted(files) == [".gitattributes", "README.md", "data/train-00000-of-00001.parquet"]
    found = {}
    for name in (PUSHED_DATA, str(source)):
        folder = tmp_path / f"prepared{len(found)}"
        done = place.run_recipe("prepare", f"data.source={name}", f"data.prepared_dir={folder}", HF_TOKEN=TOKEN)
        assert done.code == 0, done.err
        found[name] = {path.name: path.read_bytes() for path in (folder / "train").glob("*.arrow")}
    assert found[PUSHED_DATA] == found[str(source)] != {}
    cached = {path.read_bytes() for path in (place.folder / "hf" / "hub").rglob("blobs/*")}
    assert parquet in cached  # byte for byte


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("prepare", f"data.source={NOTHING}"),
        ("prepare", "data.source=no name"),
        ("prepare", f"model.name={NOTHING}"),
        ("train", f"model.name={NOTHING}"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(place, prepared, target, tmp_path_factory, command, override):
    """Before anything is written, and before data is fetched in vain: the cache is a new one."""
    asked, cache = len(place.hub.log), str(tmp_path_factory.mktemp("cache"))
    settings = [override, f"run_dir={target}"]
    settings += [f"data.prepared_dir={target}" if command == "prepare" else f"data.tokenizer={MODEL}"]
    assert_refused(place.run_recipe(command, *settings, HF_HOME=cache), override.split("=")[1])
    assert not [request for request in place.hub.log[asked:] if "train.jsonl" in request]


def test_damaged_data_is_one_message(place, target):
    settings = (f"data.source={DAMAGED}", f"data.prepared_dir={target}")
    assert_refused(place.run_recipe("prepare", *settings), DAMAGED)


def test_damaged_weights_are_one_message(place):
    assert_refused(place.run("generate", DAMAGED, "--prompt", "The sky"), DAMAGED)


def test_a_private_data_set_needs_a_token_that_is_written_nowhere(place, target):
    settings = [f"data.source={PRIVATE}", "data.prepared_dir=secret/prepared", "run_dir=secret/run"]
    for command in ("prepare", "train"):
        result = place.run_recipe(command, *settings, HF_TOKEN=TOKEN)
        assert result.code == 0, result.err
        assert TOKEN not in result.out + result.err
    files = [path for path in (place.folder / "secret").rglob("*") if path.is_file()]
    assert {"manifest.json", "environment.json", "README.md"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]

    # `datasets` would now give its cached copy to whoever may not read the set any more
    without = place.run_recipe("prepare", f"data.source={PRIVATE}", f"data.prepared_dir={target}")
    assert_refused(without, PRIVATE)
    assert "HF_TOKEN" in without.err


def test_a_pickle_is_neither_executed_nor_sent_away_for_conversion(place, prepared, target):
    """transformers would have a public service convert it, and load what that proposes to its owner."""
    settings = (f"model.name={PICKLED}", f"data.tokenizer={MODEL}", f"run_dir={target}")
    result = place.run_recipe("train", *settings)
    assert_refused(result, PICKLED)
    assert "safetensors" in result.err
    assert not (place.folder.parent / "sprung").exists()
    assert not [request for request in place.hub.log if "pytorch_model.bin" in request]


def test_a_hub_that_does_not_answer_is_one_message(place, prepared, target):
    with LocalHub({}, {}) as gone:
        pass
    assert_refused(place.run_recipe("prepare", f"data.prepared_dir={target}", HF_ENDPOINT=gone.url), DATA)
