"""Encoders: whichever is chosen gives the very ids of the tokenizer."""

import gzip
import json
import pickle
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, SAMPLE, read_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from clm_dist.preparation import encoders
from clm_dist.preparation.encode import choose
from clm_dist.preparation.encoders import TokenizersEncoder, has_long_run
from clm_dist.preparation.nasty import nasty_texts

TEXTS = [" ".join(row["answers"]["text"]) for row in read_rows(SAMPLE)]
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
LLAMA_3 += r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace("{1,3}", "")
FAST = ("gpt2", "llama3", "qwen2")  # for tiktoken


def byte_level(pattern=None, normalizer=None, size=900, special=("<|endoftext|>",)):
    """A trained BPE over bytes; of GPT-2's splitting, or of a pattern as in Llama 3."""
    bpe = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*split, last]) if split else last
    if normalizer:
        bpe.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet)
    )
    return bpe


def changed(bpe, change):
    """The same tokenizer after a change of its JSON."""
    settings = json.loads(bpe.to_str())
    change(settings)
    return Tokenizer.from_str(json.dumps(settings))


def llama_3():
    """As converted from tiktoken: whole pieces are looked up first."""
    return changed(byte_level(LLAMA_3), lambda settings: settings["model"].update(ignore_merges=True))


def llama_2():
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=special, max_token_length=12))
    return bpe


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special))
    return tokenizer


def characters():
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(vocab_size=200, special_tokens=["?"]))
    return tokenizer


class ShoutingTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer whose Python part does something of its own."""

    def _encode_plus(self, text, *args, **kwargs):
        texts = text.upper() if isinstance(text, str) else [one.upper() for one in text]
        return super()._encode_plus(texts, *args, **kwargs)


FAMILIES = {
    "gpt2": (byte_level, "tiktoken"),
    "llama3": (llama_3, "tiktoken"),
    "qwen2": (
        lambda: byte_level(QWEN_2, normalizers.NFC(), special=["<|endoftext|>", "<|im_start|>", "</think>"]),
        "tiktoken",
    ),
    "llama2": (llama_2, "tokenizers"),
    "unigram": (unigram, "tokenizers"),
    "wordpiece": (word_piece, "tokenizers"),
    "characters": (characters, "tokenizers"),
    "byt5": (ByT5Tokenizer, "transformers"),
    "shouting": (lambda: ShoutingTokenizer(tokenizer_object=byte_level()), "transformers"),
}


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer


@pytest.fixture(scope="module")
def built():
    """(tokenizer, choice, encoder) by name, each made once and as a worker gets it."""
    made = {}

    def get(name):
        if name not in made:
            tokenizer = wrapped(FAMILIES[name][0]())
            choice = choose(tokenizer, TEXTS, "tiktoken" if FAMILIES[name][1] == "tiktoken" else None)
            made[name] = tokenizer, choice, pickle.loads(pickle.dumps(choice)).build()
        return made[name]

    return get


def assert_same(tokenizer, encoder, texts):
    expected = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids, lengths = encoder.encode(texts)
    assert lengths.dtype == np.int64 and lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == [token for text in expected for token in text]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_of_the_tokenizer(built, name):
    tokenizer, choice, encoder = built(name)
    assert choice.name == FAMILIES[name][1], choice.reason
    assert choice.reason.startswith(choice.name)
    nasty = nasty_texts(tokenizer.get_added_vocab())
    for texts in (nasty, nasty[::-7], TEXTS):  # [::-7]: other neighbours in a batch
        assert_same(tokenizer, encoder, texts)
    assert encoder.encode(TEXTS)[0].dtype == (np.uint16 if choice.dtype.itemsize == 2 else np.uint8)
    ids, lengths = encoder.encode([])
    assert (ids.shape, lengths.shape, ids.dtype) == ((0,), (0,), choice.dtype)


PIECES = st.sampled_from(
    ["<|endoftext|>", "<|im_start|>", "</think>", "'ll", "'\u017f", "  ", "\r\n", "e\u0301", "\u1100\u1161"]
)
ANY_TEXT = st.lists(st.one_of(st.text(), PIECES, st.text("a A1'\n\t.\u00e9\u0301\u00a0")), max_size=8).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
@settings(max_examples=60)
@example(texts=["a" * 20_000, "b", " " * 20_000 + "x", "\n" * 20_000, "\u4e2d" * 20_000])
def test_the_ids_of_any_text(built, name, texts):
    tokenizer, _, encoder = built(name)
    assert_same(tokenizer, encoder, texts)


@pytest.mark.parametrize("name", FAMILIES)
def test_lone_surrogates_are_an_error(built, name):
    for text in ("\ud800", "a\udfffb"):
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            built(name)[2].encode(["fine", text])


@pytest.mark.parametrize("name", FAST)
def test_which_texts_are_for_tokenizers(built, name):
    encoder = built(name)[2]
    assert encoder.fits(TEXTS, TEXTS).all()
    unusual = ["<|endoftext|>", "x<|endoftext|>", "a" * 10_001, "a" + " " * 10_003 + "a", "fine", "<|endoftext"]
    assert encoder.fits(unusual, unusual).tolist() == [False] * 4 + [True] * 2


def test_added_tokens_that_a_normalizer_makes():
    """U+212A is K after NFC: the added token is in the normalized text alone."""
    tokenizer = wrapped(byte_level(QWEN_2, normalizers.NFC()))
    tokenizer.add_tokens(["<K>", "\u00e9\u00e9"])
    choice = choose(tokenizer, TEXTS, "tiktoken")
    assert choice.name == "tiktoken", choice.reason
    assert_same(tokenizer, choice.build(), ["<\u212a>", "<K>", "e\u0301e\u0301", "\u00e9\u00e9", "plain"])
    assert tokenizer("<\u212a>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<K>")]  # so it is a trap


def test_special_tokens_that_are_split_like_text():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<|endoftext|>", split_special_tokens=True
    )
    choice = choose(tokenizer, TEXTS, "tiktoken")
    assert choice.name == "tiktoken" and len(tokenizer("<|endoftext|>")["input_ids"]) > 1
    assert_same(tokenizer, pickle.loads(pickle.dumps(choice)).build(), ["a<|endoftext|>b", "<|endoftext|>"])


def test_a_tokenizer_that_does_not_take_every_character():
    """Without an unknown token; the user's text may well have none of those."""
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = wrapped(words)
    choice = choose(tokenizer, ["one two", "two"])
    assert choice.reason == "tokenizers, because its model is WordLevel, not BPE"
    assert_same(tokenizer, choice.build(), ["one two", "two"])
    with pytest.raises(Exception, match="WordLevel error"):
        choice.build().encode(["three"])


def test_truncation_and_padding_of_the_file_are_not_used():
    bpe = byte_level()
    bpe.enable_truncation(3)
    bpe.enable_padding(length=100)
    encoder = TokenizersEncoder(bpe.to_str(), False, np.dtype(np.uint16))
    assert_same(wrapped(bpe), encoder, ["one two three four five six seven <|endoftext|>", "one"])


@pytest.mark.parametrize("name", FAST)
def test_characters_on_which_the_engines_differ_are_for_tokenizers(built, name, monkeypatch):
    """As if tiktoken knew a Unicode version without the letter."""
    tokenizer, choice, _ = built(name)
    encoder = choice.build()
    seen = []
    monkeypatch.setattr(encoder._classes, "disagreeing", lambda text: seen.append(text) or set(text) & {"\u00e9"})
    texts = ["caf\u00e9", "na\u00efve", "\u00ef\u00e9", "plain"]
    for _ in range(2):
        assert encoder.fits(texts, texts).tolist() == [False, True, False, True]
    assert seen == ["\u00e9\u00ef"]  # each is compared once
    assert_same(tokenizer, encoder, texts)


def test_failures_of_tiktoken_are_for_tokenizers(built, monkeypatch):
    tokenizer, choice, _ = built("gpt2")
    monkeypatch.setattr(encoders, "LONG_RUN", 10**9)
    encoder = choice.build()
    texts = ["before", " " * 1_000_000 + "x", "after"]
    with pytest.raises(ValueError, match="Max stack size"):
        encoder.raw(texts)
    assert_same(tokenizer, encoder, texts)

    panic = type("PanicException", (BaseException,), {})("as of pyo3")
    monkeypatch.setattr(encoder._encoding, "encode_to_numpy", Mock(side_effect=panic))
    assert_same(tokenizer, encoder, ["text"])


def test_text_that_tiktoken_loses_is_noticed(built):
    tokenizer, choice, _ = built("gpt2")
    encoder = choice.build()
    encoder._bytes_of = encoder._bytes_of + (np.arange(len(encoder._bytes_of)) == ord("!") - 0x21)
    with pytest.raises(ValueError, match="does not match all of the text"):
        encoder.raw(["a!"])
    assert_same(tokenizer, encoder, ["a!", "b"])


def test_long_runs():
    assert not has_long_run("a" * 10_000 + " " + "b" * 10_000) and not has_long_run("a " * 50_000)
    assert has_long_run("x " + "a" * 10_001) and has_long_run("x" + " \n" * 5_002 + "y")


def test_a_worker_starts_without_torch_and_transformers(built, tmp_path):
    for name in ("gpt2", "wordpiece"):
        (tmp_path / "choice").write_bytes(pickle.dumps(built(name)[1]))
        program = (
            "import pickle, sys; from pathlib import Path\n"
            "encoder = pickle.loads(Path(sys.argv[1]).read_bytes()).build()\n"
            "assert len(encoder.encode(['one two'])[0])\n"
            "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & sys.modules.keys(), sorted(sys.modules)\n"
            "assert ('tiktoken' in sys.modules) == (sys.argv[2] == 'gpt2')\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "choice"), name]
        subprocess.run(command, check=True, cwd=ROOT, timeout=120)


def test_nasty_texts_stay_nasty_and_few():
    texts = nasty_texts(["<added>"])
    assert texts == nasty_texts(["<added>"]) and texts != nasty_texts() and sum(map(len, texts)) < 200_000
    assert set(map(chr, range(256))) | {"\U0010ffff", "\ufdd0", "\u212a", "\u1100"} <= set("".join(texts))
    assert "" in texts and "<added>" in texts and " " * 600 in texts


@pytest.mark.real_data
@pytest.mark.parametrize("wanted", ["fastokens", "tiktoken"])
def test_real_answers_with_the_real_tokenizer(real_data, wanted):
    with gzip.open(real_data / "eli5_category" / "eli5-category-test.json.gz", "rt") as file:
        texts = [" ".join(row["answers"]["text"]) for row in json.load(file)]
    tokenizer = AutoTokenizer.from_pretrained(real_data / "distilgpt2")
    choice = choose(tokenizer, texts[:100], wanted)
    assert choice.name == wanted, choice.reason
    encoder = choice.build()
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids, lengths = encoder.encode(texts)
    assert len(texts) == 5411 and len(ids) == 1_820_121  # as counted by others
    assert lengths.tolist() == list(map(len, expected))
    assert np.array_equal(ids, np.fromiter((token for text in expected for token in text), np.int64, len(ids)))
    assert encoder.fits(texts, texts).all()
