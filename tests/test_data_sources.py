"""Which files are one data set, and in which proportions several sources come. Words are tokens."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from desk import END, by_contents, documents, flat, held_out, of_source, words
from test_mixture import slow_mixture

from clm_dist.errors import ConfigError


def test_however_files_are_named_it_is_one_data_set(desk, monkeypatch):
    texts = {name: documents(name, [3, 9, 1, 5, 2]) for name in "abc"}
    paths = [desk.write(f"texts/{name}.jsonl", some) for name, some in texts.items()]
    inner = [f"{path.parent}/../texts/{path.name}" for path in paths]
    monkeypatch.chdir(desk.folder)
    ways = {
        "list": paths,
        "backwards": paths[::-1],
        "folder": paths[0].parent,
        "glob": f"{desk.folder}/texts/*.jsonl",
        "globs": [f"{desk.folder}/*/[ab].jsonl", f"{desk.folder}/texts/[bc]*"],
        "twice": [*paths, paths[1], paths[0].parent],
        "from here": ["texts/a.jsonl", *inner, *paths],
    }
    sets = {name: desk.prepare(source, name) for name, source in ways.items()}
    expected = flat(words(flat([texts[path.stem] for path in by_contents(*paths)])))
    for name, one in sets.items():
        assert one.manifest.splits["train"].documents == 15, name
        assert one.words() == expected[: 75 // 8 * 8], name  # 20 words and 5 ends in each file
        assert one.manifest.key == sets["list"].manifest.key, name
        assert one.contents() == sets["list"].contents(), name
    two = desk.prepare(paths[:2], "two")
    assert two.manifest.key != sets["list"].manifest.key


def test_two_files_of_the_same_text_are_two(desk):
    """Who copies a file and names both means it; who names one file twice does not."""
    a = desk.write("a.jsonl", documents("a", [3] * 6))
    b = desk.write("b.jsonl", documents("a", [3] * 6))
    found = desk.prepare([a, b, a])
    assert found.pieces() == words(documents("a", [3] * 6)) * 2
    alone = desk.prepare([a, b, a], "alone", deduplicate=True)
    assert alone.pieces() == words(documents("a", [3] * 6))
    assert alone.manifest.left_out.copies == 6


def test_renamed_files_are_the_same_and_so_are_files_that_swap_names(desk, capsys):
    a, b = desk.write("a.jsonl", documents("a", [3, 4])), desk.write("b.jsonl", documents("b", [5, 6]))
    before = desk.prepare([a, b])
    stamps = {path: path.stat().st_mtime_ns for path in before.folder.rglob("*")}
    aside = desk.folder / "c.jsonl"
    for old, new in ((a, aside), (b, a), (aside, b)):
        old.rename(new)
    z = desk.write("z.jsonl", documents("a", [3, 4]))
    for number, sources in enumerate(([a, b], [b, a], [a, z])):
        after = desk.prepare(sources)
        assert capsys.readouterr().out.count("already prepared, nothing to do") == 1
        assert {path: path.stat().st_mtime_ns for path in after.folder.rglob("*")} == stamps
        anew = desk.prepare(sources, f"anew{number}")
        assert anew.manifest.key == before.manifest.key
        assert anew.contents() == before.contents()
        capsys.readouterr()


def test_a_folder_of_parquet(desk):
    (desk.folder / "tables").mkdir()
    texts = {"a": documents("a", [3] * 40), "b": documents("b", [2] * 30)}
    for name, some in texts.items():
        rows = [{"answer": {"text": [text, "y"], "score": 1}, "other": 2} for text in some]
        pq.write_table(pa.Table.from_pylist(rows), desk.folder / "tables" / f"{name}.parquet", row_group_size=7)
    (desk.folder / "tables" / "README.md").write_text("not text")
    found = desk.prepare(desk.folder / "tables", text_column="answer.text", text_separator=" z ")
    first, second = by_contents(*(desk.folder / "tables").glob("*.parquet"))
    expected = words([f"{text} z y" for text in texts[first.stem] + texts[second.stem]])
    assert found.words() == flat(expected)[: (40 * 6 + 30 * 5) // 8 * 8]


# Identity


def bpe(folder: Path, merges) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc"]
    model = models.BPE({symbol: n for n, symbol in enumerate(symbols)}, merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(folder)
    return folder


def test_one_changed_merge_is_another_tokenizer(desk):
    source = desk.write("a.jsonl", ["abc"] * 9)
    one = bpe(desk.folder / "one", [("a", "b"), ("b", "c")])
    other = bpe(desk.folder / "other", [("b", "c"), ("a", "b")])  # the same tokens, the other first
    first = desk.prepare(source, tokenizer=str(one))
    with pytest.raises(ConfigError, match=r"was prepared with tokenizer .*one .*the tokenizer given has sha256"):
        desk.prepare(source, tokenizer=str(other))
    second = desk.prepare(source, "second", tokenizer=str(other))
    assert first.manifest.key != second.manifest.key
    a, c, ab, bc = ord("a") - ord("!") + 1, ord("c") - ord("!") + 1, 257, 258  # printable bytes come first, by value
    assert first.rows()[0, :3].tolist() == [ab, c, 0]
    assert second.rows()[0, :3].tolist() == [a, bc, 0]
    moved = one.rename(desk.folder / "moved")
    assert desk.prepare(source, tokenizer=str(moved)).manifest == first.manifest  # a renamed one is the same


OTHER = {
    "eval_fraction": 0.5,
    "split_seed": 7,
    "text_column": "title",
    "text_separator": "|",
    "on_error": "skip",
    "deduplicate": True,
    "min_document_tokens": 2,
    "max_document_tokens": 5,
    "append_eos": False,
    "block_size": 4,
    "packing": "best_fit",
    "independent_shards": 1,
}


def test_every_option_that_decides_the_blocks_is_compared(desk):
    source = desk.folder / "a.jsonl"
    rows = [{"text": text, "title": text} for text in documents("a", [3, 4, 5] * 9)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = desk.prepare(source)
    keys = {first.manifest.key}
    for name, value in OTHER.items():
        before = getattr(desk.config(source).data, name)
        with pytest.raises(ConfigError) as caught:
            desk.prepare(source, **{name: value})
        assert f"was prepared with data.{name}={before!r}, the recipe says {value!r}" in str(caught.value)
        assert len(caught.value.problems) == 2  # the other says what to do
        keys.add(desk.prepare(source, name, **{name: value}).manifest.key)
    assert len(keys) == len(OTHER) + 1
    with pytest.raises(ConfigError, match=r"data\.mixture=None, the recipe says"):
        desk.prepare([{"source": source, "weight": 1}])


# A mixture


def test_shares_are_exact_and_stand_in_the_manifest(desk):
    """What is in the blocks is what the rule says, document for document; the manifest counts the same."""
    draw = random.Random(0)
    texts = {name: documents(name, [draw.randint(1, 9) for _ in range(60)]) for name in "abc"}
    weights = [0.5, 0.3, 0.2]
    entries = [
        {"source": desk.write(f"{name}.jsonl", texts[name]), "weight": w}
        for name, w in zip("abc", weights, strict=True)
    ]
    found = desk.prepare(entries)
    expected, taken = slow_mixture([words(some) for some in texts.values()], weights, "first_exhausted")
    counts = found.manifest.splits["train"]
    assert found.words() == flat(expected)[: counts.blocks * 8]
    assert counts.remainder == len(flat(expected)) % 8
    assert counts.shares == [
        {"weight": w, "documents": t.documents, "tokens": t.tokens, "passes": t.passes, "unused": 60 - t.documents}
        for w, t in zip(weights, taken, strict=True)
    ]
    assert found.manifest.left_out.unused == 180 - len(expected) > 0
    for share, name in zip(counts.shares, "abc", strict=True):
        in_blocks = sum(map(len, of_source(found.pieces(), name)))
        assert 0 <= share["tokens"] - in_blocks < 8  # what the remainder holds
        assert abs(share["tokens"] - share["weight"] * counts.tokens) <= 10  # a document
    assert counts.bytes == sum(len(" ".join(one[:-1])) for one in expected)
    # the wrong idiom, as many documents of each as its weight says, has other shares of the tokens
    long = desk.write("long.jsonl", documents("d", [30] * 60))
    uneven = desk.prepare([entries[0], {"source": long, "weight": 0.5}], "uneven").manifest.splits["train"].shares
    assert abs(uneven[0]["tokens"] - uneven[1]["tokens"]) <= 31
    assert uneven[0]["documents"] > 4 * uneven[1]["documents"]


def test_all_exhausted_repeats_training_and_never_evaluation(desk):
    texts = {"a": documents("a", [4] * 80), "b": documents("b", [4] * 30)}
    entries = [{"source": desk.write(f"{name}.jsonl", some), "weight": 1} for name, some in texts.items()]
    found = desk.prepare(entries, mixture_stop="all_exhausted", eval_fraction=0.2, block_size=5)  # a document a block
    outside = held_out(texts["a"] + texts["b"], 0.2)
    trained = Counter(" ".join(piece[:-1]) for piece in found.pieces())
    evaluated = Counter(" ".join(piece[:-1]) for piece in found.pieces("eval"))
    assert set(trained) == set(texts["a"] + texts["b"]) - outside
    kept = {name: [text for text in some if text not in outside] for name, some in texts.items()}
    passes = len(kept["a"]) / len(kept["b"])
    assert {trained[text] for text in kept["a"]} == {1}
    assert {trained[text] for text in kept["b"]} <= {int(passes), int(passes) + 1}
    assert set(evaluated.values()) == {1} and set(evaluated) < outside
    shares = found.manifest.splits["eval"].shares
    assert shares[0]["documents"] - shares[1]["documents"] in (0, 1)
    assert found.manifest.left_out.unused == len(outside) - len(evaluated) > 0
    train = found.manifest.splits["train"].shares
    assert [share["unused"] for share in train] == [0, 0]
    assert (train[0]["passes"], train[1]["passes"]) == (1, int(passes))
    first = desk.prepare(entries, "first", eval_fraction=0.2, block_size=5)
    assert set(Counter(map(tuple, first.pieces())).values()) == {1}
    assert first.pieces("eval") == found.pieces("eval")


def test_sources_of_a_mixture_may_have_different_columns_even_of_one_file(desk):
    rows = [{"text": f"a{n} x", "title": f"b{n} x", "deep": {"er": f"c{n} x"}} for n in range(40)]
    path = desk.folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = (None, "title", "deep.er")
    entries = [{"source": path, "weight": 1, **({"text_column": column} if column else {})} for column in columns]
    found = desk.prepare(entries, block_size=3)
    assert found.pieces() == [[f"{name}{n}", "x", END] for n in range(40) for name in "abc"]
    assert [one["text_column"] for one in found.manifest.options["mixture"]] == ["text", "title", "deep.er"]
    with pytest.raises(ConfigError, match=r"was prepared with data.mixture=.*'weight': 1.0.*'weight': 2.0"):
        desk.prepare([{**entries[0], "weight": 2}, *entries[1:]], block_size=3)


def test_a_source_of_a_mixture_without_documents_is_refused(desk):
    """It would end the mixture at its first turn: with documents of 20 tokens that is a data set of one document."""
    a = {"source": desk.write("a.jsonl", documents("a", [20] * 60)), "weight": 1}
    empty = {"source": desk.write("empty.jsonl", ["", " "]), "weight": 1}
    short = {"source": desk.write("short.jsonl", documents("b", [1] * 60)), "weight": 1}
    few = {"source": desk.write("few.jsonl", documents("c", [20, 20])), "weight": 1}
    assert not held_out(documents("a", [20] * 60) + documents("c", [20, 20]), 0.1) & set(documents("c", [20, 20]))
    for stop in ("first_exhausted", "all_exhausted"):
        desk.refused([a, empty], r"empty.jsonl holds no text in column text \(2 empty", mixture_stop=stop)
        needle = "{}.jsonl has no document for the {} split .*give it more text"
        desk.refused([a, short], needle.format("short", "train"), mixture_stop=stop, min_document_tokens=2)
        desk.refused([a, a], needle.format("a", "train"), mixture_stop=stop, deduplicate=True)
        desk.refused([a, few], needle.format("few", "eval"), mixture_stop=stop, eval_fraction=0.1)


# Which documents
