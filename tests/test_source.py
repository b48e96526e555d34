"""Reading documents: every format gives the same texts, every fault names its place."""

import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clm_dist.config import DataConfig
from clm_dist.data import source as source_module
from clm_dist.data.records import Bad, BadRecordError, columns_of, text_of, texts_of
from clm_dist.data.source import open_source
from clm_dist.errors import UserError

RECORDS = [
    {"q_id": "a", "answers": {"a_id": ["1", "2"], "text": ["One.", "Two, é."]}},
    {"q_id": "b", "answers": {"a_id": ["3"], "text": ["Three\nlines\n."]}},
    {"q_id": "c", "answers": {"a_id": [], "text": []}},
]
TEXTS = ["One. Two, é.", "Three\nlines\n.", ""]


def config(source, **fields):
    fields = {"text_column": "answers.text", "eval_fraction": 0.0, **fields}
    source = [str(one) for one in source] if isinstance(source, list) else str(source)
    return DataConfig(source=source, prepared_dir="unused", **fields)


def opened(source, **fields):
    data = config(source, **fields)
    return open_source(data, data.entries()[0])


def read(source, split="train", **fields):
    """Texts, and `Bad` where there is none."""
    data = config(source, **fields)
    parts = opened(source, **fields).parts(split)
    chunks = [chunk for part in parts for chunk in part.chunks()]
    return [text for chunk in chunks for text in texts_of(chunk, data.text_column, data.text_separator)]


def texts(source, split="train", **fields):
    found = read(source, split, **fields)
    assert not [text for text in found if isinstance(text, Bad)]
    return found


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_json_array_and_json_lines_in_either_ending(tmp_path, ending):
    array, lines = json.dumps(RECORDS, indent=1), "\n".join(map(json.dumps, RECORDS)) + "\n\n"
    for number, (name, content) in enumerate([("json", array), ("json", lines), ("jsonl", lines), ("jsonl", array)]):
        assert texts(write(tmp_path / f"{number}.{name}{ending}", content)) == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(RECORDS[0]))) == TEXTS[:1]
    assert texts(write(tmp_path / "a.csv", "\ufeffbody,x\nhello,1\n"), text_column="body") == ["hello"]
    assert texts(write(tmp_path / "a.txt", "\ufeffhello\n")) == ["hello"]


def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == TEXTS
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert texts(tmp_path / "b.parquet.gz") == TEXTS


def test_csv_with_commas_quotes_and_newlines(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "body"], ["1", 'He said "a, b"\nand left.'], ["2", "x" * 200_000]])
    assert texts(tmp_path / "a.csv", text_column="body") == ['He said "a, b"\nand left.', "x" * 200_000]


def test_plain_text_is_cut_at_blank_lines(tmp_path):
    write(tmp_path / "a.txt", "\nfirst\nstill first\n\n  \nsecond\n")
    assert texts(tmp_path / "a.txt") == ["first\nstill first", "second"]


def test_a_folder_a_glob_and_a_list(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name)
    write(tmp_path / "README.md", "not data")
    assert sorted(texts(tmp_path)) == ["a", "b", "c"]
    assert sorted(texts(str(tmp_path / "[ab].txt"))) == ["a", "b"]
    assert sorted(texts([tmp_path / "c.txt", tmp_path / "[ab].txt", tmp_path / "a.txt"])) == ["a", "b", "c"]


def test_names_do_not_decide_the_order_of_documents(tmp_path):
    """Else a renamed file would be another data set."""
    for name, text in (("a", "one"), ("b", "two"), ("c", "three")):
        write(tmp_path / "first" / f"{name}.txt", text)
        write(tmp_path / "second" / f"{'cab'['abc'.index(name)]}.txt", text)
    assert texts(tmp_path / "first") == texts(tmp_path / "second")
    assert opened(tmp_path / "first").identity() == opened(tmp_path / "second").identity()


def test_named_splits(tmp_path):
    write(tmp_path / "train-1.txt", "one")
    write(tmp_path / "train-2.txt", "two")
    write(tmp_path / "validation.txt", "held out")
    named = {"eval_split": "validation", "eval_fraction": None}
    assert sorted(texts(tmp_path, "train", **named)) == ["one", "two"]
    assert texts(tmp_path, "validation", **named) == ["held out"]
    with pytest.raises(UserError, match=r"belongs to the split test \(files: train-1.txt"):
        texts(tmp_path, "test", eval_split="test", eval_fraction=None)


def test_columns():
    assert columns_of(RECORDS[0]) == ["q_id", "answers.a_id", "answers.text"]
    assert text_of({"answers.text": "flat"}, "answers.text", " ") == "flat"
    assert text_of({"answers": [{"text": "a"}, {"text": "b"}]}, "answers.text", "|") == "a|b"
    assert text_of({"text": None}, "text", " ") == ""
    assert text_of({"answers": None}, "answers.text", " ") == ""
    assert text_of({"answers": {"text": ["a", None, "b"]}}, "answers.text", "|") == "a||b"
    with pytest.raises(BadRecordError, match=r"no column answers\.txt; did you mean answers\.text"):
        text_of(RECORDS[0], "answers.txt", " ")


def test_identity_is_of_contents_not_of_names(tmp_path):
    write(tmp_path / "a.txt", "same")
    write(tmp_path / "b.txt", "same")
    write(tmp_path / "c.txt", "other")
    a, b, c = (opened(tmp_path / f"{name}.txt").identity() for name in "abc")
    assert a == b != c


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_a_file_that_may_not_be_read(tmp_path):
    write(tmp_path / "a.jsonl", "{}").chmod(0)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)  # pytest's own folders, made for their owner alone
    os.seteuid(65534)
    try:
        with pytest.raises(
            UserError, match=r"cannot read .*a\.jsonl: Permission denied; check the path and its permissions"
        ):
            opened(tmp_path / "a.jsonl")
    finally:
        os.seteuid(0)


def test_a_file_of_no_known_kind(tmp_path):
    write(tmp_path / "a.docx", "x")
    with pytest.raises(UserError, match=r"is of no known kind; data.source takes .json"):
        opened(tmp_path / "a.docx")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/part-*.jsonl", "./missing", "a/b/c"])
def test_what_does_not_exist(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist|holds no file"):
        opened(name)


def test_a_misspelt_file_names_its_neighbour(tmp_path):
    write(tmp_path / "answers.jsonl", "{}")
    with pytest.raises(UserError, match=r"did you mean .*answers.jsonl\?"):
        opened(tmp_path / "answer.jsonl")


def test_links_are_followed_and_hidden_files_are_no_data(tmp_path):
    write(tmp_path / "elsewhere" / "b.txt", "linked")
    write(tmp_path / "src" / "a.txt", "here")
    write(tmp_path / "src" / ".c.txt", "hidden")
    (tmp_path / "src" / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "src")
    assert sorted(texts(tmp_path / "src")) == ["here", "linked"]


def test_a_word_in_one_name_does_not_silence_the_others(tmp_path):
    write(tmp_path / "my-train-trip.txt", "one")
    write(tmp_path / "a.txt", "two")
    assert sorted(texts(tmp_path)) == ["one", "two"]
    assert texts(write(tmp_path / "eli5-category-test.txt", "three")) == ["three"]  # a file that was asked for
    write(tmp_path / "named" / "train-1.txt", "one")
    write(tmp_path / "named" / "validation-1.txt", "held out")
    assert texts(tmp_path / "named") == ["one"]


def test_packed_or_not_is_part_of_what_a_file_is(tmp_path):
    write(tmp_path / "a.jsonl.gz", json.dumps(RECORDS[0]))
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(packed)
    assert opened(tmp_path / "a.jsonl.gz").identity() != opened(tmp_path / "b.jsonl").identity()


def test_a_file_that_changes_is_noticed(tmp_path):
    [part] = opened(write(tmp_path / "a.jsonl", "{}")).parts("train")
    part.check_unchanged()
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{}")
    with pytest.raises(UserError, match="changed while it was read"):
        part.check_unchanged()


def test_a_file_that_changes_while_it_is_hashed_is_noticed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "{}")
    original = source_module._sha256

    def slowly(one):
        digest = original(one)
        path.write_text("{}{}")
        return digest

    monkeypatch.setattr(source_module, "_sha256", slowly)
    [part] = opened(path).parts("train")
    with pytest.raises(UserError, match="changed while it was read"):
        part.check_unchanged()


def test_a_target_inside_its_source_is_refused(tmp_path):
    write(tmp_path / "a.txt", "text")
    data = DataConfig(source=str(tmp_path), prepared_dir=str(tmp_path / "sub" / "set"), eval_fraction=0)
    with pytest.raises(UserError, match=r"lies in data.source=.*choose another place"):
        open_source(data, data.entries()[0])
