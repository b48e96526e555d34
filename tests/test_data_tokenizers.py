"""Tokenizers of all kinds in `prepare`: of which type ids are, and what becomes of texts that one does not take."""

import datasets
import numpy as np
import pytest
from desk import END, make_tokenizer


def test_a_text_that_the_tokenizer_does_not_take_is_a_bad_record(desk):
    """A vocabulary of words without an unknown one: what it cannot encode has its place like any other fault."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words_only = Tokenizer(models.WordLevel({"<eos>": 0, "a1": 1, "a2": 2}))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token="<eos>").save_pretrained(desk.folder / "strict")
    source = desk.write("a.jsonl", ["a1 a2"] * 4 + ["a1 stranger"] + ["a2"] * 4)
    strict = {"tokenizer": str(desk.folder / "strict"), "block_size": 2}
    needle = r"a\.jsonl, line 5, byte 72: the tokenizer cannot encode it \(.*\); take one that knows all bytes"
    desk.refused(source, needle, **strict)
    found = desk.prepare(source, on_error="skip", **strict)
    assert (found.manifest.left_out.bad, found.manifest.splits["train"].documents) == (1, 8)
    assert found.manifest.splits["train"].tokens == 4 * 3 + 4 * 2


@pytest.mark.parametrize(("size", "expected"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_smallest_type_that_holds_the_vocabulary(desk, size, expected):
    """Character level, so to speak; the last word of all is in the text."""
    vocabulary = [END, "<unk>", *map(str, range(size - 2))]
    folder = make_tokenizer(desk.folder / "tokenizer", vocabulary)
    source = desk.write("a.jsonl", [f"{size - 3} 0 1", "5 6"] * 8)
    found = desk.prepare(source, tokenizer=str(folder), block_size=7)
    assert found.rows().tolist() == [[size - 1, 2, 3, 0, 7, 8, 0]] * 8
    assert found.manifest.dtype == expected
    opened = datasets.load_from_disk(str(found.folder))["train"]
    assert opened.features["input_ids"].feature.dtype == expected
    [arrow] = (found.folder / "train").glob("*.arrow")
    assert arrow.stat().st_size - 7 * 8 * np.dtype(expected).itemsize < 1500  # the rest is the header


def test_a_tokenizer_written_in_python(desk):
    """Of transformers, without a file: 3 special tokens, the bytes, 125 more."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(desk.folder / "bytes")
    texts = ["né", "a\u0000b", "  "]
    found = desk.prepare(desk.write("a.jsonl", texts), tokenizer=str(desk.folder / "bytes"), block_size=4)
    assert found.rows().tolist() == [[byte + 3 for byte in "né".encode()] + [1], [97 + 3, 3, 98 + 3, 1]]
    assert (found.manifest.dtype, found.manifest.left_out.empty) == ("uint16", 1)


# The Hub, as it comes
