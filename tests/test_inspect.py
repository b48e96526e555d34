"""`data inspect` shows what is there; `data verify` finds every byte that is not what was written. On the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command
from desk import Desk, documents, make_tokenizer

from clm_dist.errors import UserError
from clm_dist.preparation.inspect import histogram, inspect
from clm_dist.preparation.verify import verify

LENGTHS = [3, 1, 20, 2, 2, 6, 7, 14]  # words; an end of text comes to each
VOCABULARY = ["<eos>", "<unk>", *(f"a{number}" for number in range(8)), *(f"e{number}" for number in range(4)), "x"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Two sets of the same eight documents, one cut and one packed, each with four of evaluation and a bad record."""
    folder = tmp_path_factory.mktemp("inspect")
    desk = Desk(folder, make_tokenizer(folder / "words", VOCABULARY))
    train = desk.write("texts/train.jsonl", documents("a", LENGTHS))
    with train.open("a") as file:
        file.write("{}\n")
    desk.write("texts/test.jsonl", documents("e", [3, 3, 7, 1]))
    options = {"eval_fraction": None, "eval_split": "test", "on_error": "skip"}
    desk.prepare(folder / "texts", "cut", **options)
    desk.prepare(folder / "texts", "packed", packing="best_fit", min_document_tokens=2, **options)
    return desk


@pytest.fixture
def copy(desk, tmp_path):
    """A copy of the packed set to spoil."""
    return Path(shutil.copytree(desk.folder / "packed", tmp_path / "copy"))


def shown(*arguments) -> list[str]:
    done = run_command("data", "inspect", *arguments)
    assert done.code == 0 and not done.err, done.err
    return done.out.splitlines()


def refused(command: str, *arguments) -> str:
    done = run_command("data", command, *arguments)
    assert done.code == 2 and not done.out and "Traceback" not in done.err, done.err
    return done.err


def test_facts_of_the_manifest(desk):
    """55 words and 8 ends are 63 tokens: 7 blocks of 8 and 7 tokens left over."""
    out = shown(desk.folder / "cut")
    manifest = json.loads((desk.folder / "cut" / "manifest.json").read_text())
    assert out[0] == f"{desk.folder / 'cut'} (format {manifest['format']}, key {manifest['key'][:12]})"
    facts = dict(line.split(maxsplit=1) for line in out[1:4])
    assert facts["source"] == str(desk.folder / "texts")
    assert facts["tokenizer"] == f"{desk.tokenizer}, 15 tokens, uint8 on disk"
    for option in ("eval_split='test'", "on_error='skip'", "block_size=8", "packing='concatenate'", "append_eos=True"):
        assert option in facts["options"].split(", ")
    assert "eval_fraction" not in facts["options"]  # None
    assert out[4].split(maxsplit=2) == ["left", "out", "1 bad records (bad_records.jsonl)"]
    size = sum(map(len, documents("a", LENGTHS)))
    assert f"train: 8 documents, {size} bytes of text, 63 tokens = 7 blocks x 8 - 0 padding + 7" in out
    assert any(line.startswith("eval: 4 documents, ") and "18 tokens = 2 blocks x 8" in line for line in out)
    packed = shown(desk.folder / "packed")
    assert any(
        line.startswith("train: 7 documents, ") and line.endswith("61 tokens = 8 blocks x 8 - 3 padding + 0")
        for line in packed
    )


def bars(out: list[str], split: str) -> dict[tuple[str, str], int]:
    """The histogram of a split: (from, to) to count."""
    begin = next(n for n, line in enumerate(out) if line.startswith(f"{split}:"))
    found = {}
    for line in out[begin + 2 :]:
        if not line:
            break
        parts = line.split()
        found[parts[0], parts[2]] = int(parts[-1])
    return found


def test_histogram_by_hand(desk):
    """Tokens: 4, 2, 21, 3, 3, 7, 8 and 8 of 15, the rest of which is the remainder."""
    out = shown(desk.folder / "cut")
    assert bars(out, "train") == {("2", "3"): 3, ("4", "7"): 2, ("8", "15"): 2, ("16", "31"): 1}
    assert bars(out, "eval") == {("4", "7"): 2, ("8", "15"): 1}  # 4, 4, 8 fill both blocks; the fourth is the remainder
    packed = bars(shown(desk.folder / "packed"), "train")
    # pieces: 4, 8 + 8 + 5 of 21, 3, 3, 7, 8, 8 + 7 of 15
    assert packed == {("2", "3"): 2, ("4", "7"): 4, ("8", "15"): 4}


def test_bars_are_as_long_as_their_counts():
    """The longest has 40 signs; the smallest is seen; a bin without any stands between those that have some."""
    lines = histogram(np.array([1] * 80 + [2] * 40 + [3] + [1024]))
    assert len(lines) == 11
    assert lines[0] == f"          1 -         1  {'#' * 40}  80"
    assert lines[1] == f"          2 -         3  {'#' * 21:<40}  41"
    assert lines[5] == f"         32 -        63  {'':<40}  0"
    assert lines[10] == f"      1,024 -     2,047  {'#':<40}  1"
    assert histogram(np.array([], dtype=int)) == []


def test_any_block_with_the_bounds_of_its_documents(desk):
    """By hand: a0 x x . a1 . a2 x | x x x x x x x x | x x x x x x x x | x x . a3 x . a4 x | . a5 ..."""
    cut = desk.folder / "cut"
    expected = {
        0: [
            "8 tokens, 3 documents start in it",
            "document, tokens 0 to 3",
            "document, tokens 4 to 5",
            "document, tokens 6 to 7",
        ],
        1: ["8 tokens, 0 documents start in it", "continued, tokens 0 to 7"],
        3: [
            "8 tokens, 2 documents start in it",
            "continued, tokens 0 to 2",
            "document, tokens 3 to 5",
            "document, tokens 6 to 7",
        ],
        4: ["8 tokens, 1 documents start in it", "continued, tokens 0 to 0", "document, tokens 1 to 7"],
    }
    texts = {
        0: ["a0 x x<eos>", "a1<eos>", "a2 x"],
        1: ["x x x x x x x x"],
        3: ["x x<eos>", "a3 x<eos>", "a4 x"],
        4: ["<eos>", "a5 x x x x x<eos>"],
    }
    for number, lines in expected.items():
        out = inspect(str(cut), "train", number).splitlines()
        assert out[0] == f"block {number} of 7 (train): {lines[0]}"
        assert out[1::2] == [f"--- {line}" for line in lines[1:]]
        assert [text.replace(" <eos>", "<eos>") for text in out[2::2]] == texts[number]
    assert shown(cut, "--block", "1", "--split", "eval")[2].startswith("e2")


def test_padding_is_shown(desk):
    """61 tokens in 8 blocks: one has three of padding."""
    packed = desk.folder / "packed"
    used = np.load(packed / "train" / "used.npy").tolist()
    number = used.index(min(used))
    out = inspect(str(packed), "train", number).splitlines()
    assert f"{used[number]} tokens" in out[0]
    assert out[-1] == f"--- padding, {8 - used[number]} tokens"
    assert sum(8 - one for one in used) == 3


@pytest.mark.parametrize("number", ["7", "-1", "1000000"])
def test_a_block_out_of_range(desk, number):
    err = refused("inspect", desk.folder / "cut", f"--block={number}")
    assert f"--block {number}: the train split of {desk.folder / 'cut'} has blocks 0 to 6" in err


def test_a_split_without_blocks(desk):
    desk.prepare(desk.folder / "texts" / "train.jsonl", "alone", on_error="skip")
    assert any(line.startswith("eval: 0 documents") for line in shown(desk.folder / "alone"))
    assert "has no blocks" in refused("inspect", desk.folder / "alone", "--block=0", "--split=eval")
    assert "all as written" in verify(str(desk.folder / "alone"))


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_is_no_prepared_set(desk, command, tmp_path):
    for folder in (desk.folder / "texts", tmp_path / "nowhere", desk.folder / "packed" / "train"):
        assert f"{folder} holds no prepared data; run `clm-dist prepare RECIPE` first" in refused(command, folder)
    for content in (b"", b"{", b"[]", b"{}", b'"text"', b"\xff", b'{"format": 2}'):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            verify(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    assert "has format 1, this version reads 2; prepare again elsewhere" in refused(command, tmp_path)


# verify


def test_a_good_set(desk, copy):
    size = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json")
    files = sum(path.is_file() for path in copy.rglob("*")) - 1
    done = run_command("data", "verify", copy)
    key = json.loads((copy / "manifest.json").read_text())["key"][:12]
    tokens = 61 + 16  # two words fewer with an end each; of evaluation the document of one word
    assert done.out == f"{copy}: {files} files, {size:,} bytes, {tokens} tokens: all as written (key {key})\n", done.out
    assert done.code == 0
    (copy / "notes.txt").write_text("mine")
    (copy / "train" / ".DS_Store").write_text("")
    done = run_command("data", "verify", copy)
    assert done.code == 0 and "all as written" in done.out
    assert done.out.endswith("not part of it: notes.txt, train/.DS_Store\n")


EVERY = (
    *("bad_records.jsonl", "dataset_dict.json", "eval/data-00000-of-00001.arrow", "eval/dataset_info.json"),
    *("eval/documents.npy", "eval/state.json", "eval/used.npy", "tokenizer/tokenizer.json"),
    *("tokenizer/tokenizer_config.json", "train/data-00000-of-00001.arrow", "train/dataset_info.json"),
    *("train/documents.npy", "train/state.json", "train/used.npy"),
)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_every_file_is_among_those_to_spoil(copy):
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert files == {*EVERY, "manifest.json"}


@pytest.mark.parametrize("name", EVERY)
def test_one_wrong_bit_anywhere(copy, name):
    for at in (0, (copy / name).stat().st_size // 2, -1):
        flip(copy / name, at)
        with pytest.raises(
            UserError, match=rf"{copy / name} is damaged: its SHA-256 is [0-9a-f]+, [0-9a-f]+ was written"
        ):
            verify(str(copy))
        flip(copy / name, at)
    verify(str(copy))


@pytest.mark.parametrize("name", EVERY)
def test_a_file_cut_short_longer_or_gone(copy, name):
    content = (copy / name).read_bytes()
    for spoilt in (content[:-1], b"", content + b"\n"):
        (copy / name).write_bytes(spoilt)
        with pytest.raises(UserError, match=rf"{copy / name} has {len(spoilt):,} bytes, {len(content):,} were written"):
            verify(str(copy))
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"{copy / name} is missing; copy it again from where it is whole, or remove"):
        verify(str(copy))


def test_the_first_bad_file_is_named_on_the_command_line(copy):
    """In the order of names; as each is mended, the next."""
    for name in ("train/documents.npy", "tokenizer/tokenizer.json"):
        flip(copy / name, 100)
    (copy / "eval" / "data-00000-of-00001.arrow").unlink()
    assert f"{copy / 'eval/data-00000-of-00001.arrow'} is missing" in refused("verify", copy)
    (copy / "eval" / "data-00000-of-00001.arrow").write_bytes(b"")
    assert f"{copy / 'eval/data-00000-of-00001.arrow'} has 0 bytes" in refused("verify", copy)
    flip(copy / "bad_records.jsonl", 0)
    err = refused("verify", copy)
    assert f"{copy / 'bad_records.jsonl'} is damaged" in err and "arrow" not in err


EDITS = {
    "key": lambda m: m.update(key="0" * 64),
    "option": lambda m: m["options"].update(block_size=16),
    "another option": lambda m: m["options"].update(surplus=1),
    "source": lambda m: m["source_identity"].update(train=["json:0"]),
    "tokenizer": lambda m: m.update(tokenizer_sha256="0" * 64),
    "tokens": lambda m: m["splits"]["train"].update(tokens=62),
    "remainder": lambda m: m["splits"]["eval"].update(remainder=1),
    "a sum": lambda m: m["files"]["train/state.json"].update(sha256="0" * 64),
    "a size": lambda m: m["files"]["train/state.json"].update(bytes=1),
    "a sum less": lambda m: m["files"]["train/state.json"].pop("sha256"),
    "a split more": lambda m: m["splits"].update(test=m["splits"]["eval"]),
    "a field less": lambda m: m.pop("files"),
    "a field more": lambda m: m.update(surplus=1),
    "a count less": lambda m: m["splits"]["train"].pop("tokens"),
    "no files": lambda m: m.update(files=[]),
    "no splits": lambda m: m.update(splits=None),
    "text for a number": lambda m: m["splits"]["train"].update(tokens="61"),
    "an option less": lambda m: m["options"].pop("block_size"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest(copy, edit):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    EDITS[edit](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        verify(str(copy))
    assert str(copy) in str(caught.value) and "prepare again" in str(caught.value)
    if edit in ("key", "option", "source", "tokenizer"):
        assert "manifest.json was changed: its key is not that of what it says" in str(caught.value)
    if edit == "tokens":
        assert f"{copy / 'train'}: holds 61 tokens, 62 went in" in str(caught.value)
