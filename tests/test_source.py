"""Reading documents: every format gives the same texts, every fault names its place."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clm_dist.config import DataConfig
from clm_dist.data.source import columns_of, open_source, text_of
from clm_dist.errors import UserError

RECORDS = [
    {"q_id": "a", "answers": {"a_id": ["1", "2"], "text": ["One.", "Two, é."]}},
    {"q_id": "b", "answers": {"a_id": ["3"], "text": ["Three\nlines\n."]}},
    {"q_id": "c", "answers": {"a_id": [], "text": []}},
]
TEXTS = ["One. Two, é.", "Three\nlines\n.", ""]


def config(source, **fields):
    fields = {"text_column": "answers.text", "eval_fraction": 0.0, **fields}
    return DataConfig(source=str(source), prepared_dir="unused", **fields)


def texts(source, split="train", **fields):
    return list(open_source(config(source, **fields)).texts(split))


def write(path, text):
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


def test_a_folder_and_a_glob_in_the_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name)
    write(tmp_path / "README.md", "not data")
    assert texts(tmp_path) == ["a", "b", "c"]
    assert texts(str(tmp_path / "[ab].txt")) == ["a", "b"]


def test_named_splits(tmp_path):
    write(tmp_path / "train-1.txt", "one")
    write(tmp_path / "train-2.txt", "two")
    write(tmp_path / "validation.txt", "held out")
    named = {"eval_split": "validation", "eval_fraction": None}
    assert texts(tmp_path, "train", **named) == ["one", "two"]
    assert texts(tmp_path, "validation", **named) == ["held out"]
    with pytest.raises(UserError, match=r"belongs to the split test \(files: train-1.txt"):
        texts(tmp_path, "test", eval_split="test", eval_fraction=None)


def test_columns():
    assert columns_of(RECORDS[0]) == ["q_id", "answers.a_id", "answers.text"]
    assert text_of({"answers.text": "flat"}, "answers.text", " ", "here") == "flat"
    assert text_of({"answers": [{"text": "a"}, {"text": "b"}]}, "answers.text", "|", "here") == "a|b"
    assert text_of({"text": None}, "text", " ", "here") == ""
    assert text_of({"answers": None}, "answers.text", " ", "here") == ""
    assert text_of({"answers": {"text": ["a", None, "b"]}}, "answers.text", "|", "here") == "a||b"


def test_identity_is_of_contents_not_of_names(tmp_path):
    write(tmp_path / "a.txt", "same")
    write(tmp_path / "b.txt", "same")
    write(tmp_path / "c.txt", "other")
    a, b, c = (open_source(config(tmp_path / f"{name}.txt")).identity() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("name", "content", "needle"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a.jsonl, line 2, column \d+: broken JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"a.json, line 2, column 11: broken JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', r"line 2: byte 0xe9 at offset 28 is not UTF-8"),
        ("a.txt", b"ok\n\n\xff\xfe", r"line 3: byte 0xff at offset 4 is not UTF-8; convert"),
        ("a.txt", b"it\x92s", "iconv -f windows-1252 -t utf-8"),
        ("a.txt", "text".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("a.csv", b'text\n"open', r"a.csv, line \d: broken CSV"),
        ("a.csv", b"text\na,b\n", r"a.csv, line 2: more fields than the header names"),
        ("a.jsonl", b'{"texts": "a", "title": "b"}', r"no column text; did you mean texts\?.*there are: texts, title"),
        ("a.jsonl", b'{"text": 3}', r"a.jsonl, line 1: column text holds int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl, line 1: column text holds half of a surrogate pair"),
        ("a.jsonl", b"3", r"a.jsonl, line 1: no column text"),
        ("a.jsonl.gz", b"not gzip", r"is not a whole gzip file"),
        ("a.parquet", b"not parquet", r"is not a whole parquet file"),
        ("a.docx", b"x", r"is of no known kind; data.source takes .json"),
    ],
)
def test_faults_name_file_and_place(tmp_path, name, content, needle):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=needle):
        texts(tmp_path / name, text_column="text")


def test_a_gzip_file_cut_short(tmp_path):
    write(tmp_path / "a.jsonl.gz", "\n".join(json.dumps({"text": str(n) * 50}) for n in range(500)))
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not a whole gzip file"):
        texts(tmp_path / "a.jsonl.gz", text_column="text")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/part-*.jsonl", "./missing", "a/b/c"])
def test_what_does_not_exist(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist|holds no file"):
        open_source(config(name))


def test_a_misspelt_file_names_its_neighbour(tmp_path):
    write(tmp_path / "answers.jsonl", "{}")
    with pytest.raises(UserError, match=r"did you mean .*answers.jsonl\?"):
        open_source(config(tmp_path / "answer.jsonl"))
