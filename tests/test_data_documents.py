"""Which documents are left out, where the others stand. Words are tokens."""

import json
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from desk import END, VOCABULARY, Prepared, by_contents, documents, flat, of_source, words

from clm_dist.data import files, records


def test_copies_within_a_file_across_files_and_across_sources(desk):
    one, two = documents("a", [3] * 10), documents("b", [3] * 10)
    a = desk.write("a.jsonl", [*one[:4], one[0], *one[4:], one[3], one[3]])  # three copies
    b = desk.write("b.jsonl", [two[0], one[9], *two, one[9]])  # one in the file, two across
    found = desk.prepare([a, b], deduplicate=True)
    assert found.manifest.left_out.copies == 6
    assert found.manifest.splits["train"].documents == 20
    seen = dict.fromkeys(flat([records_of(path) for path in by_contents(a, b)]))  # the first of them stays
    assert found.pieces() == words(seen)
    assert len(desk.prepare([a, b], "kept").pieces()) == 26  # the wrong idiom: none
    mixed = desk.prepare([{"source": a, "weight": 1}, {"source": b, "weight": 1}], "mixed", deduplicate=True)
    assert mixed.manifest.left_out.copies == 6
    assert sorted(mixed.pieces()) == sorted(words([*one, *two]))
    assert of_source(mixed.pieces(), "a") == words(one)  # all of the first source's


def records_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_training_loses_what_evaluation_has(desk):
    train = [
        desk.write("train-1.jsonl", documents("a", [3] * 10)),
        desk.write("train-2.jsonl", documents("b", [3] * 10)),
    ]
    outside = [*documents("a", [3] * 4), *documents("c", [3] * 10), *documents("c", [3])]
    source = [*train, desk.write("test-1.jsonl", outside)]
    found = desk.prepare(source, eval_split="test", eval_fraction=None, deduplicate=True)
    assert found.pieces("eval") == words(outside[:-1])
    assert sorted(found.pieces()) == sorted(words([*documents("a", [3] * 10)[4:], *documents("b", [3] * 10)]))
    assert found.manifest.left_out.copies == 4 + 1
    both = desk.prepare(source, "both", eval_split="test", eval_fraction=None)  # the wrong idiom
    assert len([piece for piece in both.pieces() if piece in both.pieces("eval")]) == 4
    needle = "the train split has no document left: all are too short, too long or copies; change"
    desk.write("test-1.jsonl", [*documents("a", [3] * 10), *documents("b", [3] * 10)])
    desk.refused(source, needle, eval_split="test", eval_fraction=None, deduplicate=True)


def test_bounds_of_length_are_inclusive_and_do_not_count_end_of_text(desk):
    source = desk.write("a.jsonl", documents("a", [1, 2, 3, 4, 5, 6, 7] * 3))
    for append_eos in (True, False):
        into = f"set{append_eos}"
        found = desk.prepare(
            source,
            into,
            min_document_tokens=3,
            max_document_tokens=5,
            append_eos=append_eos,
            block_size=2,
            packing="best_fit",
        )
        counts, left = found.manifest.splits["train"], found.manifest.left_out
        assert (left.too_short, left.too_long, counts.documents) == (6, 6, 9)
        assert counts.tokens == (3 + 4 + 5) * 3 + 9 * append_eos
        starts = {word for word in found.words() if word.startswith("a")}
        assert starts == {f"a{n}" for n in range(21) if n % 7 in (2, 3, 4)}
    two = desk.prepare(source, "two", min_document_tokens=7)
    assert two.pieces() == words(documents("a", [7] * 21)[6::7])
    desk.refused(source, "no document left: .*data.min_document_tokens=8", min_document_tokens=8)
    # a document that is both too long and a copy is told once
    twice = desk.write("b.jsonl", [*documents("b", [9, 2]), *documents("b", [9, 2]), *documents("c", [2] * 5)])
    left = desk.prepare(twice, "twice", deduplicate=True, max_document_tokens=8).manifest.left_out
    assert (left.too_long, left.copies) == (2, 1)


def test_an_evaluation_that_all_filters_away_is_refused(desk):
    source = [desk.write("train.jsonl", documents("a", [5] * 9)), desk.write("test.jsonl", documents("b", [1] * 9))]
    needle = "the eval split has no document left"
    desk.refused(source, needle, eval_split="test", eval_fraction=None, min_document_tokens=2)


def test_documents_of_nothing_of_white_space_and_of_no_tokens(desk):
    huge = documents("b", [100])
    nothing = ["", " ", "\n\t\u2003\u00a0", "~", "~ ~"]
    texts = [nothing[0], *documents("a", [3, 1]), *nothing[1:4], *huge, nothing[4], *documents("c", [2])]
    found = desk.prepare(desk.write("a.jsonl", texts), deduplicate=True)
    assert found.manifest.left_out.empty == 5 and found.manifest.left_out.copies == 0
    assert found.manifest.splits["train"].documents == 4
    expected = flat(words([*documents("a", [3, 1]), *huge, *documents("c", [2])]))  # 4 + 2 + 101 + 3 tokens
    assert found.words() == expected[:104]
    assert np.load(found.folder / "train" / "documents.npy").tolist() == [0, 4, 6]  # the last lies in the remainder
    counts = found.manifest.splits["train"]
    assert (counts.tokens, counts.blocks, counts.remainder, counts.cut_documents) == (110, 13, 6, 0)


# Broken records


def test_no_document_at_all_is_told_before_copies_are_looked_for(desk):
    needle = r"split train of .* holds no text in column text \(0 empty documents\)"
    desk.refused(desk.write("a.jsonl", []), needle, deduplicate=True)


def test_skipped_records_are_counted_and_written_aside(desk):
    good = documents("a", [3] * 8)
    lines = [json.dumps({"text": text}).encode() for text in good]
    broken = [b'{"text": "a', b'{"title": "y"}', b'{"text": "\xff"}', b"[1]", b'{"text": 3}']
    mixed = [line for pair in zip(lines, broken, strict=False) for line in pair] + lines[5:]
    path = desk.folder / "a.jsonl"
    path.write_bytes(b"\n".join(mixed) + b"\n")
    found = desk.prepare(path, on_error="skip", block_size=4)
    assert found.pieces() == words(good)
    assert found.manifest.left_out.bad == 5
    rows = [json.loads(line) for line in (found.folder / "bad_records.jsonl").read_text().splitlines()]
    begins = np.cumsum([0] + [len(line) + 1 for line in mixed])[1:10:2]
    within = [9, 0, 10, 0, 0]  # at the quote that does not end, at the wrong byte
    for row, place, at, begin, record in zip(rows, (2, 4, 6, 8, 10), within, begins, broken, strict=True):
        assert set(row) == {"place", "problem", "record"}
        assert row["place"] == f"{path}, line {place}, byte {begin + at}"
        assert row["record"] == record.decode(errors="backslashreplace")
    needles = ["broken JSON in column 10", "no column text", "byte 0xff is not UTF-8", "no column text", "holds int"]
    assert all(needle in row["problem"] for needle, row in zip(needles, rows, strict=True))
    assert "bad_records.jsonl" in found.manifest.files
    clean = desk.prepare(desk.write("b.jsonl", good), "clean", on_error="skip")
    assert not (clean.folder / "bad_records.jsonl").exists()
    message = desk.refused(path, "broken JSON")
    assert message.startswith(f"{path}, line 2, byte {begins[0] + 9}: ")
    for name in ("only.jsonl", "only.json"):
        (desk.folder / name).write_bytes(b"\n".join(broken) if name == "only.jsonl" else b"[[1], [], 2, {}]")
        bad = 5 if name == "only.jsonl" else 4
        needle = rf"holds no text in column text \(0 empty documents, {bad} bad records\)"
        desk.refused(desk.folder / name, needle, on_error="skip")


@pytest.mark.parametrize("line", [1, 3])
@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_column_in_one_of_two_files(desk, line, place):
    """Whether it is read first or second, from its first record or later."""
    good = desk.write("good.jsonl", documents("a", [3] * 6))
    for salt in range(100):  # contents decide which is read second
        rows = [{"text": f"b{n} x"} if n + 1 < line else {"body": f"b{n} x", "n": salt} for n in range(5)]
        wrong = desk.folder / "wrong.jsonl"
        wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if by_contents(good, wrong).index(wrong) == place:
            break
    byte = sum(len(json.dumps(row)) + 1 for row in rows[: line - 1])
    message = desk.refused([good, wrong], "no column text")
    assert message.startswith(f"{wrong}, line {line}, byte {byte}: no column text")
    assert "set data.text_column (there are: body, n)" in message
    found = desk.prepare([good, wrong], on_error="skip", block_size=6)
    assert found.manifest.left_out.bad == 5 - (line - 1)
    assert sorted(found.pieces()) == sorted(words([*documents("a", [3] * 6), *documents("b", [2] * (line - 1))]))


def test_half_of_a_gzip_file(desk):
    draw = random.Random(0)
    texts = [" ".join(draw.choice(VOCABULARY[2:]) for _ in range(9)) for _ in range(400)]
    path = desk.write("a.jsonl.gz", texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    whole = zlib.decompressobj(31).decompress(path.read_bytes()).decode().split("\n")[:-1]
    assert 100 < len(whole) < 300
    assert "not a whole gzip file" in desk.refused(path, r"a\.jsonl\.gz, byte \d+ of its unpacked contents")
    found = desk.prepare(path, on_error="skip", block_size=10)
    assert found.pieces() == words([json.loads(line)["text"] for line in whole])
    assert found.manifest.left_out.bad == 1
    [row] = [json.loads(line) for line in (found.folder / "bad_records.jsonl").read_text().splitlines()]
    assert row["place"].startswith(f"{path}, byte ") and "not a whole gzip file" in row["problem"]


# Blocks


def test_documents_are_where_documents_npy_says(desk):
    draw = random.Random(1)
    texts = documents("a", [draw.choice([1, 2, 3, 7, 8, 30]) for _ in range(90)])
    found = desk.prepare(desk.write("a.jsonl", texts))
    whole = words(texts)
    kept = found.pieces()
    assert flat(kept) == flat(whole)[: len(found.rows()) * 8]
    assert kept[:-1] == whole[: len(kept) - 1]
    assert kept[-1] == whole[len(kept) - 1][: len(kept[-1])]  # the remainder may cut the last
    assert not (found.folder / "train" / "used.npy").exists()
    without = desk.prepare(desk.folder / "a.jsonl", "without", append_eos=False)
    assert flat(without.pieces()) == flat([text.split() for text in texts])[: len(without.rows()) * 8]
    assert without.pieces()[:-1] == [text.split() for text in texts][: len(without.pieces()) - 1]


def are_whole(prepared: Prepared, texts: Sequence[str], size: int) -> bool:
    """Whether every document of at most `size` tokens stands in one block, and longer ones in as few as can be."""
    cut = [one[begin : begin + size] for one in words(texts) for begin in range(0, len(one), size)]
    starts = np.load(prepared.folder / "train" / "documents.npy")
    inside = all((at % size) + len(piece) <= size for at, piece in zip(starts, prepared.pieces(), strict=True))
    return inside and Counter(map(tuple, prepared.pieces())) == Counter(map(tuple, cut))


def test_best_fit_cuts_no_document_that_fits(desk):
    draw = random.Random(2)
    texts = documents("a", [draw.choice([1, 2, 4, 5, 6, 7, 8, 20]) for _ in range(90)])
    source = desk.write("a.jsonl", texts)
    found = desk.prepare(source, packing="best_fit")
    assert are_whole(found, texts, 8)
    counts, rows, used = found.manifest.splits["train"], found.rows(), found.used()
    assert counts.tokens == len(flat(words(texts))) == used.sum()
    assert counts.padding == (8 - used).sum() == len(rows) * 8 - counts.tokens > 0
    assert (counts.blocks, counts.remainder) == (len(rows), 0)
    assert counts.cut_documents == sum(len(one) > 8 for one in words(texts)) > 0
    assert counts.documents == 90
    padding = rows[np.arange(8) >= used[:, None]]
    assert set(padding.tolist()) == {VOCABULARY.index(END)}  # the tokenizer has no padding of its own
    cut = desk.prepare(source, "cut")  # the wrong idiom
    assert not are_whole(cut, texts, 8)
    sevens = desk.prepare(desk.write("b.jsonl", documents("b", [7] * 5)), "sevens", packing="best_fit")
    assert (sevens.manifest.splits["train"].padding, sevens.manifest.splits["train"].blocks) == (0, 5)
    fives = desk.prepare(desk.write("c.jsonl", documents("c", [4] * 5)), "fives", packing="best_fit")
    assert (fives.manifest.splits["train"].padding, fives.manifest.splits["train"].blocks) == (15, 5)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_independent_shards_lose_less_than_a_block_each(desk, monkeypatch, packing):
    for module in (records, files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    draw = random.Random(3)
    texts = documents("a", [draw.randint(1, 12) for _ in range(90)])
    source = desk.write("a.jsonl", texts)
    whole, shards = flat(words(texts)), 4
    found = desk.prepare(source, packing=packing, independent_shards=shards)
    counts = found.manifest.splits["train"]
    assert found.manifest.options["independent_shards"] == shards
    assert len(whole) == counts.tokens == counts.blocks * 8 + counts.remainder - counts.padding
    assert found.used().sum() == counts.tokens - counts.remainder
    one = desk.prepare(source, "one", packing=packing)  # the other idiom
    if packing == "best_fit":
        assert counts.remainder == 0 and are_whole(found, texts, 8)
        return
    assert one.manifest.splits["train"].remainder == len(whole) % 8
    assert 8 <= counts.remainder < shards * 8
    # where a document does not come whole a shard ends, and what follows is the start of the next
    at, lost = 0, []
    for piece in found.pieces():
        while whole[at] != piece[0]:  # documents of which nothing is left
            at += 1
            lost[-1] += 1
        assert whole[at : at + len(piece)] == piece
        at += len(piece)
        rest = 0 if piece[-1] == END else whole[at:].index(END) + 1
        at += rest
        lost.append(rest)
    lost[-1] += len(whole) - at
    assert sum(lost) == counts.remainder
    assert all(gap < 8 for gap in lost) and sum(gap > 0 for gap in lost) <= shards


def test_more_shards_than_chunks_of_one_source_of_a_mixture(desk, monkeypatch):
    """A shard in which a source has nothing could keep no proportions: refused rather than text left unused."""
    for module in (records, files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    many = {"source": desk.write("a.jsonl", documents("a", [5] * 30)), "weight": 1}
    few = {"source": desk.write("b.jsonl", documents("b", [5] * 3)), "weight": 1}
    desk.refused([many, few], "b.jsonl has no document .*in one of data.independent_shards", independent_shards=4)
