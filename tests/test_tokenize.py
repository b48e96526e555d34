"""Tokenizers: trained, identified, applied."""

import numpy as np
import pytest
from conftest import SAMPLE, read_rows

from clm_dist.data.tokenize import ids_dtype, load_tokenizer, save_tokenizer, tokenizer_sha256, train_tokenizer
from clm_dist.errors import UserError

TEXTS = [" ".join(row["answers"]["text"]) for row in read_rows(SAMPLE)][:40]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, 400)


def test_training_is_deterministic_and_the_identity_is_of_contents(bpe, tmp_path):
    assert tokenizer_sha256(train_tokenizer(TEXTS, 400)) == tokenizer_sha256(bpe)
    assert tokenizer_sha256(train_tokenizer(TEXTS, 401)) != tokenizer_sha256(bpe)
    bpe.save_pretrained(tmp_path / "elsewhere")
    assert tokenizer_sha256(load_tokenizer(str(tmp_path / "elsewhere"))) == tokenizer_sha256(bpe)


def test_every_byte_comes_back(bpe):
    nasty = ["caf\u00e9 \u4f60\u597d \U0001f600 e\u0301", "\x00\x01\n\t  x ", "<|endoftext", "a" * 500]
    for text in nasty:
        assert bpe.decode(bpe(text)["input_ids"]) == text


def test_what_is_saved_is_small_and_the_same(bpe, tmp_path):
    bpe.save_pretrained(tmp_path / "as transformers does")
    save_tokenizer(bpe, tmp_path / "ours")
    sizes = [(tmp_path / name / "tokenizer.json").stat().st_size for name in ("as transformers does", "ours")]
    assert sizes[1] < 0.8 * sizes[0]
    assert tokenizer_sha256(load_tokenizer(str(tmp_path / "ours"))) == tokenizer_sha256(bpe)


def test_the_smallest_type_that_holds_the_vocabulary():
    assert ids_dtype(256) == np.uint8
    assert ids_dtype(257) == np.uint16
    assert ids_dtype(50_257) == np.uint16
    assert ids_dtype(65_536) == np.uint16
    assert ids_dtype(65_537) == np.uint32


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="cannot load the tokenizer="):
        load_tokenizer(str(tmp_path))


def test_whether_special_tokens_are_split_is_part_of_the_identity(bpe, tmp_path):
    save_tokenizer(bpe, tmp_path / "one")
    other = load_tokenizer(str(tmp_path / "one"))
    other.split_special_tokens = True
    assert tokenizer_sha256(other) != tokenizer_sha256(bpe)


def test_a_path_that_does_not_exist_names_its_neighbour(bpe, tmp_path):
    save_tokenizer(bpe, tmp_path / "distilgpt2")
    with pytest.raises(
        UserError, match=r"there is no tokenizer at .*distilgtp2; did you mean .*distilgpt2\?; give a folder"
    ):
        load_tokenizer(str(tmp_path / "distilgtp2"))
