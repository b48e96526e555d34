"""The fastest encoder: the same ids, and stopped when they are not; encoders asked for by name."""

import pickle
from unittest.mock import Mock

import numpy as np
import pytest
from test_encode import FAMILIES, FAST, TEXTS, assert_same, wrapped

from clm_dist.errors import UserError
from clm_dist.preparation import encode
from clm_dist.preparation.encode import choose
from clm_dist.preparation.encoders import DifferentIdsError
from clm_dist.preparation.nasty import nasty_texts


@pytest.mark.parametrize("name", FAST)
def test_fastokens_gives_the_same(name):
    """The fastest, where it is installed; compared with tiktoken on the way."""
    tokenizer = wrapped(FAMILIES[name][0]())
    choice = choose(tokenizer, TEXTS)
    assert choice.name == "fastokens", choice.reason
    encoder = pickle.loads(pickle.dumps(choice)).build()
    nasty = nasty_texts(tokenizer.get_added_vocab())
    for texts in (nasty, nasty[::-7], TEXTS):
        assert_same(tokenizer, encoder, texts)


def test_a_fastokens_that_errs_is_stopped(monkeypatch):
    """Mutant: one id in a checked text is another one, or one too many; and where it is not installed tiktoken does."""
    tokenizer = wrapped(FAMILIES["gpt2"][0]())
    encoder = choose(tokenizer, TEXTS).build()
    right = encoder._unchecked
    for wrong in (
        lambda ids, lengths: (ids ^ (np.arange(len(ids)) == 0), lengths),
        lambda ids, lengths: (ids, lengths + 1),
    ):
        monkeypatch.setattr(encoder, "_unchecked", lambda texts, wrong=wrong: wrong(*right(texts)))
        with pytest.raises(DifferentIdsError, match="for one of 1 texts, the first of which begins 'some text'"):
            encoder.encode(["some text", "more"])
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: None)
    assert choose(tokenizer, TEXTS).name == "tiktoken"
    with pytest.raises(UserError, match=r"--encoder fastokens cannot be used, because it is not installed"):
        choose(tokenizer, TEXTS, "fastokens")


def test_a_fastokens_that_gives_up_is_not_the_fault_of_a_text(monkeypatch):
    tokenizer = wrapped(FAMILIES["gpt2"][0]())
    encoder = choose(tokenizer, TEXTS).build()
    monkeypatch.setattr(encoder, "_fastokens", Mock(encode_batch_flat=Mock(side_effect=RuntimeError("match limit"))))
    assert_same(tokenizer, encoder, TEXTS)


def test_what_cannot_be_had_is_refused_by_name():
    for name, wanted, why in (
        ("wordpiece", "tiktoken", "its model is not BPE|WordPiece"),
        ("byt5", "tokenizers", "ByT5Tokenizer is written in Python"),
    ):
        with pytest.raises(UserError, match=rf"--encoder {wanted} cannot be used, because .*({why})"):
            choose(wrapped(FAMILIES[name][0]()), TEXTS, wanted)
    tokenizer = wrapped(FAMILIES["gpt2"][0]())
    for wanted in ("tokenizers", "transformers"):  # slower than need be, when that is asked for
        choice = choose(tokenizer, TEXTS, wanted)
        assert choice.name == wanted and "--encoder says so" in choice.reason
        assert_same(tokenizer, choice.build(), TEXTS)
