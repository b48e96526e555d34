"""Files in chunks: every record once, every fault with its place, and no good record lost to a bad one."""

import csv
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_source import opened, read, write

from clm_dist.data import files, json_array, records
from clm_dist.data.records import Bad, Lines, texts_of

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("name", "content", "needle", "good"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}', r"line 2, byte 26: broken JSON in column 13", "ac"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"record 2, byte 26: broken JSON \(Expecting value\)", "a"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"record 2, byte 15: broken JSON \(no comma", "a"),
        ("a.json", b'[{"text": "a"}', r"record 2, byte 14: broken JSON", "a"),
        ("a.json", b'[{"text": "a"}] {', r"record 2, byte 16: broken JSON \(text after the array", "a"),
        ("a.json", b'[{"text": "a"}, {"text": "\xff"}]', r"record 2, byte 26: byte 0xff is not UTF-8", "a"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"line 2, byte 27: byte 0xe9 is not UTF-8", "a"),
        ("a.txt", b"a\n\n\xff\xfe\n\nb", r"line 3, byte 3: byte 0xff is not UTF-8; convert", "ab"),
        ("a.txt", b"it\x92s", "iconv -f windows-1252 -t utf-8", ""),
        ("a.txt", "text".encode("utf-16"), "iconv -f utf-16 -t utf-8", ""),
        ("a.csv", b'text\na\n"open', r"a.csv, line \d, byte 7: broken CSV", "a"),
        ("a.csv", b"text\na,b\nc\n", r"a.csv, line 2, byte 5: more fields than the header names", "c"),
        ("a.csv", b"text\na\nb\xff\nc\n", r"a.csv, line 3, byte 8: byte 0xff is not UTF-8", "ac"),
        ("a.jsonl", b'{"texts": "a", "title": "b"}', r"no column text; did you mean texts\?.*are: texts, title", ""),
        ("a.jsonl", b'{"text": 3}', r"a.jsonl, line 1, byte 0: column text holds int, not text", ""),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\\ud800"}',
            r"line 2, byte 14: column text holds half of a surrogate",
            "a",
        ),
        ("a.jsonl", b"3", r"a.jsonl, line 1, byte 0: no column text", ""),
        ("a.jsonl.gz", b"not gzip", r"not a whole gzip file", ""),
        ("a.json.gz", b"not gzip", r"not a whole gzip file", ""),
        ("a.csv.gz", b"not gzip", r"not a whole gzip file", ""),
        ("a.txt.gz", b"not gzip", r"not a whole gzip file", ""),
        ("a.parquet", b"not parquet", r"not a whole parquet file", ""),
    ],
)
def test_faults_name_file_record_and_byte_and_cost_no_good_record(tmp_path, name, content, needle, good):
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name, text_column="text")
    bad = [text for text in found if isinstance(text, Bad)]
    assert len(bad) == 1
    assert re.search(needle, str(bad[0].error())) and "a." in bad[0].place
    assert [text for text in found if isinstance(text, str)] == list(good)


@pytest.mark.parametrize("ending", ["jsonl.gz", "json.gz", "txt.gz", "csv.gz"])
def test_of_a_gzip_file_cut_short_all_that_is_whole_is_kept(tmp_path, ending):
    rows = [random.Random(n).randbytes(40).hex() for n in range(3000)]
    content = {
        "jsonl.gz": "\n".join(json.dumps({"text": row}) for row in rows),
        "json.gz": json.dumps([{"text": row} for row in rows]),
        "txt.gz": "\n\n".join(rows),
        "csv.gz": "text\n" + "\n".join(rows),
    }[ending]
    write(tmp_path / f"a.{ending}", content)
    whole = (tmp_path / f"a.{ending}").read_bytes()
    (tmp_path / f"a.{ending}").write_bytes(whole[: len(whole) * 3 // 4])
    *good, bad = read(tmp_path / f"a.{ending}", text_column="text")
    assert "not a whole gzip file" in bad.problem
    assert good[:-1] == rows[: len(good) - 1]  # the last may be cut in the midst where nothing says that it goes on
    assert len(good) > 2000


def in_chunks(path, size, monkeypatch):
    """All records of a file that is cut into pieces of `size` bytes, and how many pieces there were."""
    for module in (records, files):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
    monkeypatch.setattr(json_array, "PIECE", size)
    [part] = opened(path, text_column="text").parts("train")
    chunks = list(part.chunks())
    for first in range(len(chunks) + 1):  # from any chunk on, the same chunks
        assert [list(chunk.records()) for chunk in part.chunks(first)] == [list(c.records()) for c in chunks[first:]]
    assert part.num_chunks() in (None, len(chunks))
    return [text for chunk in chunks for text in texts_of(chunk, "text", " ")], len(chunks)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "txt", "csv", "parquet"])
@given(texts=st.lists(TEXT, max_size=30), size=st.integers(1, 200))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_record_is_in_one_chunk(ending, texts, size, tmp_path, monkeypatch):
    path = tmp_path / f"a.{ending}"
    rows = [{"text": text} for text in texts]
    expected = texts
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("text", pa.string())])), path)
    elif ending == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
    elif ending == "txt":
        write(path, "\n\n".join(texts))
        expected = [text for text in texts if text.encode().strip()]
        if texts and expected and texts[0].startswith("\ufeff"):
            return  # a byte-order mark of the file
    else:
        write(path, json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    found, chunks = in_chunks(path, size, monkeypatch)
    assert found == expected
    if len(expected) > 1 and size < 3 and ending not in ("parquet", "jsonl", "jsonl.gz"):
        assert chunks > 1


def test_the_line_of_a_fault_is_counted_from_the_start_of_the_file(tmp_path, monkeypatch):
    lines = [json.dumps({"text": str(number)}) for number in range(50)]
    lines[37] = "{"
    for name in ("a.jsonl", "a.jsonl.gz"):
        write(tmp_path / name, "\n".join(lines))
        found, _ = in_chunks(tmp_path / name, 64, monkeypatch)
        [bad] = [text for text in found if isinstance(text, Bad)]
        assert bad.place == f"{tmp_path / name}, line 38, byte {sum(len(line) + 1 for line in lines[:37]) + 1}"
        assert bad.record == "{"


def test_lines_are_read_by_their_place_alone(tmp_path):
    """What a worker is sent of a plain file is no text."""
    write(tmp_path / "a.jsonl", json.dumps({"text": "a"}))
    [part] = opened(tmp_path / "a.jsonl", text_column="text").parts("train")
    assert list(part.chunks()) == [Lines(str(tmp_path / "a.jsonl"), 0)]


def test_a_record_larger_than_a_chunk(tmp_path, monkeypatch):
    rows = [{"text": "x" * length} for length in (1, 5000, 2, 3)]
    for name, content in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("a.json", json.dumps(rows))):
        write(tmp_path / name, content)
        write(tmp_path / f"{name}.gz", content)
        for ending in ("", ".gz"):
            found, _ = in_chunks(tmp_path / f"{name}{ending}", 100, monkeypatch)
            assert found == [row["text"] for row in rows]


def test_chunks_of_a_packed_file_end_by_its_contents(tmp_path, monkeypatch):
    """Not by how much a reading gives, which differs between versions of Python: their units would not fit together."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    draw = random.Random(0)
    rows = [json.dumps({"text": "x" * draw.choice([1, 5, 40, 300])}) for _ in range(200)]
    write(tmp_path / "a.jsonl.gz", "\n".join(rows))
    found = []
    for size in (1, 7, 64, 1000, 10**6):
        with monkeypatch.context() as patch:
            opened_as_ever = files._open

            def reading(path, size=size, original=opened_as_ever):
                file = original(path)
                few, file.read1 = file.read1, lambda _: few(size)
                return file

            patch.setattr(files, "_open", reading)
            found.append([(chunk.start, chunk.data) for chunk in files._packed_lines(tmp_path / "a.jsonl.gz")])
    assert all(chunks == found[0] for chunks in found) and len(found[0]) > 10
    assert b"".join(data for _, data in found[0]).decode() == "\n".join(rows)
