"""A data set on the Hub read as it comes."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import recipe_values, run_command, write_recipe
from desk import Desk, Prepared, documents, flat, held_out, words
from local_hub import LocalHub
from test_hub import DISPENSABLE

from clm_dist.data.hub_source import HubPart
from clm_dist.errors import RunError


@dataclass(frozen=True)
class Streams:
    """A Hub with a data set of one file and one of three, and a folder to work in."""

    folder: Path
    hub: LocalHub

    def prepare(self, name: str, into: str, *options: str, **environment: str):
        here = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "NO_PROXY": "127.0.0.1"}
        here |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **environment}
        where = [f"data.source={name}", f"data.prepared_dir={self.folder / into}"]
        return run_command("prepare", self.folder / "recipe.yaml", *where, *options, env=here)

    def prepared(self, name: str, into: str, *options: str) -> Prepared:
        done = self.prepare(name, into, *options)
        assert done.code == 0, done.err
        return Prepared(self.folder / into)


@pytest.fixture(scope="module")
def streams(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("streams")
    one, three = (Desk(folder / name, tokenizer) for name in ("one", "three"))
    one.folder.mkdir()
    three.folder.mkdir()
    one.write("train.jsonl", documents("a", [3] * 90))
    for number, name in enumerate("abc"):
        three.write(f"train-{number:05d}-of-00003.jsonl", documents(name, [3] * 30))
    text = {"tokenizer": str(tokenizer), "tokenizer_vocab_size": None, "eval_fraction": 0.1, "block_size": 4}
    write_recipe(folder / "recipe.yaml", recipe_values(folder, data=text))
    with LocalHub({}, {"some/one": one.folder, "some/three": three.folder}) as hub:
        yield Streams(folder, hub)
    assert not set(hub.unknown) - {DISPENSABLE}


STREAMING = "data.streaming=true"


def test_a_stream_is_the_same_data_set(streams):
    fetched = streams.prepared("some/one", "fetched")
    streamed = streams.prepared("some/one", "streamed", STREAMING)
    assert streamed.manifest.key == fetched.manifest.key
    assert streamed.contents() == fetched.contents()
    outside = held_out(documents("a", [3] * 90), 0.1)
    assert streamed.pieces("eval") == [one for one in words(documents("a", [3] * 90)) if " ".join(one[:-1]) in outside]


@pytest.mark.slow
def test_shards_of_a_stream_of_several_files(streams):
    whole = streams.prepared("some/three", "whole", STREAMING)
    texts = flat([documents(name, [3] * 30) for name in "abc"])
    outside = held_out(texts, 0.1)
    assert whole.pieces() == words([text for text in texts if text not in outside])
    first = streams.prepare("some/three", "shards", STREAMING, "--shard", "0/2")
    assert first.code == 0 and "shard 0 of 2 is done" in first.out, first.err
    shards = streams.prepared("some/three", "shards", STREAMING, "--shard", "1/2")
    assert shards.contents() == whole.contents()
    assert shards.manifest == whole.manifest


def test_a_stream_without_the_hub_is_one_message(streams):
    done = streams.prepare("some/one", "offline", STREAMING, HF_HUB_OFFLINE="1")
    assert done.code == 2 and "Traceback" not in done.err
    assert "data.source=some/one" in done.err
    assert "data.streaming=true" in done.err and "HF_HUB_OFFLINE=1 forbids that; unset one of them" in done.err
    assert not [path for path in streams.folder.iterdir() if "offline" in path.name]


class Stream:
    """Rows of a stream, which breaks at one of them."""

    column_names = ("text",)

    def __init__(self, breaks_at):
        self.breaks_at = breaks_at

    def with_format(self, _):
        return self

    def iter(self, batch_size):
        for number in range(5):
            if number == self.breaks_at:
                raise ConnectionError("reset by peer")
            yield pa.table({"text": [f"{number} " * 3_000_000]})  # a chunk each


def test_a_stream_that_breaks_is_no_bad_record(tmp_path):
    """It may be whole the next time: nothing may say that it ends there."""
    chunks = HubPart("data", "key", "text", Stream(breaks_at=3)).chunks()
    read = []
    with pytest.raises(RunError, match=r"data cannot be read on at record 4 \(ConnectionError: reset by peer\)"):
        read.extend(chunks)
    assert len(list(HubPart("data", "key", "text", Stream(None)).chunks())) == 5
