"""Tokenizers: trained, identified, applied."""

import numpy as np
import pytest
from conftest import SAMPLE, read_rows

from clm_dist.data.tokenize import ids_dtype, load_tokenizer, tokenize, tokenizer_sha256, train_tokenizer
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


@pytest.mark.parametrize("append_eos", [True, False])
def test_documents_become_one_stream(bpe, append_eos):
    texts = ["One.", "Two two."] * 700  # more than a batch
    batches = list(tokenize(texts, bpe, append_eos))
    assert sum(count for count, _ in batches) == 1400 and len(batches) == 2
    eos = [bpe.eos_token_id] if append_eos else []
    expected = [token for text in texts for token in bpe(text)["input_ids"] + eos]
    assert np.concatenate([ids for _, ids in batches]).tolist() == expected


def test_special_tokens_of_the_tokenizer_stay_out():
    """[CLS] and <s> would stand in the middle of blocks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[CLS]": 0, "a": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    [(count, ids)] = tokenize(["a b", "b"], tokenizer, append_eos=False)
    assert (count, ids.tolist()) == (2, [1, 2, 2])
    with pytest.raises(UserError, match=r"has no end-of-text token; set data.append_eos=false"):
        list(tokenize(["a"], tokenizer, append_eos=True))


def test_the_smallest_type_that_holds_the_vocabulary():
    assert ids_dtype(50_257) == np.uint16
    assert ids_dtype(65_536) == np.uint16
    assert ids_dtype(65_537) == np.uint32


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))
