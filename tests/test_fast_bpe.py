"""The proof that tiktoken gives the ids of a tokenizer: which it covers, which are refused, and that they have to be."""

import json
from itertools import product

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encode import LLAMA_3, QWEN_2, TEXTS, assert_same, byte_level, changed, llama_3, wrapped
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from clm_dist.preparation import fast_bpe as module
from clm_dist.preparation.encode import choose
from clm_dist.preparation.fast_bpe import GPT2_PATTERN, GPT2_PATTERN_FASTER, CharacterClasses, RefusedError, fast_bpe
from clm_dist.preparation.nasty import nasty_texts

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["".join(word) for length in range(1, 7) for word in product("abc", repeat=length)]  # 1,092
LETTERS = r"\p{L}+|\P{L}+"


def plan(tokenizer):
    return fast_bpe(json.loads(tokenizer.to_str()), np.dtype(np.uint32))


def small(merges, tokens=None, ignore_merges=False):
    """A byte-level BPE with these merges; a word is one piece. Ids: the bytes, then `tokens` (else the merges)."""
    merges = [tuple(merge.split("+")) for merge in merges]
    vocab = [*BYTES, *(tokens or dict.fromkeys(map("".join, merges)))]
    bpe = Tokenizer(models.BPE({token: n for n, token in enumerate(vocab)}, merges, ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LETTERS), "isolated"), last])
    return bpe


def tokens_of(bpe, text):
    return bpe.encode(text).tokens


def by_tiktoken(tokens, text):
    """Pieces of an ASCII text, with these tokens in the order of ranks after the bytes."""
    ranks = {token: n for n, token in enumerate([*(bytes([byte]) for byte in range(256)), *map(str.encode, tokens)])}
    encoding = tiktoken.Encoding("test", pat_str=LETTERS, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode([token]) for token in encoding.encode(text)]


def assert_equal_on(bpe, texts):
    """tiktoken alone, without the ways around it."""
    fast = plan(bpe)
    encode = fast.encoding().encode_to_numpy
    for text, expected in zip(texts, bpe.encode_batch_fast(texts), strict=True):
        assert fast.ids[encode(text)].tolist() == expected.ids, text


def test_ranks_are_of_merges_not_of_ids():
    bpe = small(["b+c", "a+b"], tokens=["ab", "bc"])
    assert tokens_of(bpe, "abc") == ["a", "bc"]
    assert by_tiktoken(["ab", "bc"], "abc") == ["ab", "c"]  # in the order of ids, as naive conversions do
    assert plan(bpe).tokens[256:] == [b"bc", b"ab"] and plan(bpe).ids[256:].tolist() == [257, 256]
    assert_equal_on(bpe, WORDS)


def test_ids_that_do_not_follow_the_merges_of_a_trained_tokenizer():
    def turn_ids(settings):
        vocab = settings["model"]["vocab"]
        settings["model"]["vocab"] = {token: len(vocab) - 1 - n for token, n in vocab.items()}
        settings["added_tokens"][0]["id"] = len(vocab) - 1

    bpe = changed(byte_level(), turn_ids)
    choice = choose(wrapped(bpe), TEXTS, "tiktoken")
    assert choice.name == "tiktoken", choice.reason
    assert_same(wrapped(bpe), choice.build(), [*nasty_texts(), *TEXTS])
    naive = {token: int(n) for token, n in zip(choice.fast.tokens, choice.fast.ids, strict=True)}
    encoding = tiktoken.Encoding("naive", pat_str=GPT2_PATTERN, mergeable_ranks=naive, special_tokens={})
    assert sum(encoding.encode_ordinary(text) != bpe.encode(text).ids for text in TEXTS) > len(TEXTS) / 2


def test_merges_in_another_order_are_another_tokenizer():
    """Many tokens are not made any more, and are left out of the table: still exact."""

    def shuffle(settings):
        merges = settings["model"]["merges"]
        settings["model"]["merges"] = [merges[n] for n in np.random.default_rng(0).permutation(len(merges))]

    bpe = changed(byte_level(), shuffle)
    assert len(plan(bpe).tokens) < len(plan(byte_level()).tokens)
    choice = choose(wrapped(bpe), TEXTS, "tiktoken")
    assert choice.name == "tiktoken", choice.reason
    assert_same(wrapped(bpe), choice.build(), [*nasty_texts(), *TEXTS])


def test_a_token_that_no_merge_makes_is_left_out():
    bpe = small(["a+b"], tokens=["ab", "abc", "ca"])
    assert tokens_of(bpe, "abc") == ["ab", "c"] and by_tiktoken(["ab", "abc", "ca"], "abc") == ["abc"]
    assert plan(bpe).tokens[256:] == [b"ab"]
    assert_equal_on(bpe, WORDS)


def test_a_token_that_is_only_looked_up():
    bpe = small(["a+b"], tokens=["abcc", "ab"], ignore_merges=True)  # ab, c, c: never two parts
    assert tokens_of(bpe, "abcc") == ["abcc"] and tokens_of(bpe, "abcca") == ["ab", "c", "c", "a"]
    assert plan(bpe).tokens[256:] == [b"ab", b"abcc"]
    assert_equal_on(bpe, WORDS)


def test_a_token_of_two_parts_that_is_only_looked_up_is_refused():
    bpe = small(["a+b"], tokens=["ab", "abc"], ignore_merges=True)
    assert tokens_of(bpe, "abca") == ["ab", "c", "a"] and by_tiktoken(["ab", "abc"], "abca") == ["abc", "a"]
    with pytest.raises(RefusedError, match="tiktoken would merge two tokens to 'abc'"):
        plan(bpe)

    def add(settings):
        settings["model"]["vocab"]["Ġzqx"] = 900  # "Ġ z q x" is of four parts in 900 tokens, "Ġzq" of three
        settings["model"]["vocab"]["zq"] = 901

    choice = choose(wrapped(changed(llama_3(), add)), TEXTS)
    assert choice.reason.startswith("tokenizers, because tiktoken would merge two tokens to 'zq'")


def test_several_merges_for_one_token():
    """All but one of them are dead letters, and where they stand together it does not matter which one lives."""
    together = small(["a+b", "b+c", "ab+c", "a+bc", "c+a"])
    assert plan(together).tokens[256:] == [b"ab", b"bc", b"abc", b"ca"]
    assert_equal_on(together, WORDS)
    apart = small(["a+b", "b+c", "a+bc", "c+a", "ab+c"])  # a+bc is the dead one: abc comes after ca
    assert tokens_of(apart, "abca") == ["ab", "ca"] and by_tiktoken(["ab", "bc", "abc", "ca"], "abca") == ["abc", "a"]
    with pytest.raises(RefusedError, match="merges that make 'abc' stand apart"):
        plan(apart)
    unused = small(["a+b", "ab+c", "c+c", "a+bc"], tokens=["ab", "abc", "cc", "bc"])  # bc is never made: one merge only
    assert_equal_on(unused, WORDS)


@st.composite
def tokenizers(draw):
    """Any few merges over three letters, ids in any order, tokens that no merge makes."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 9))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if len(left + right) < 7 and f"{left}+{right}" not in merges:
            merges.append(f"{left}+{right}")
            tokens += [left + right] * (left + right not in tokens)
    extra = draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=2))
    order = draw(st.permutations(list(dict.fromkeys([*tokens[3:], *extra]))))
    return small(draw(st.permutations(merges)), order, draw(st.booleans()))


@given(bpe=tokenizers())
@settings(max_examples=300)
def test_any_tokenizer_is_refused_or_equal_on_every_word(bpe):
    try:
        plan(bpe)
    except RefusedError:
        return
    assert_equal_on(bpe, WORDS)


def test_most_tokenizers_are_not_refused():
    """Or the test above would say little; and one with the proof switched off is caught by it."""
    bpe = small(["a+b", "b+c", "ab+c", "c+a", "ca+b"], tokens=["cab", "ca", "abc", "bc", "ab"])
    assert_equal_on(bpe, WORDS)
    naive = ["cab", "ca", "abc", "bc", "ab"]
    assert any(by_tiktoken(naive, word) != tokens_of(bpe, word) for word in WORDS[:400])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"dropout": 0.1}}, "its BPE has dropout=0.1"),
        ({"model": {"byte_fallback": True}}, "its BPE has byte_fallback=True"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "its BPE has end_of_word_suffix='</w>'"),
        ({"pre_tokenizer": {"add_prefix_space": True}}, "tiktoken adds no space before a text"),
        (
            {"pre_tokenizer": {"use_regex": False}},
            "the pre-tokenizer ByteLevel, as it is set, has no tiktoken counterpart",
        ),
        ({"pre_tokenizer": None}, r"the pre-tokenizer \(none\) has no tiktoken counterpart"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase may change any text"),
    ],
)
def test_what_has_no_counterpart_is_refused(change, reason):
    settings = json.loads(byte_level().to_str())
    for part, values in change.items():
        settings[part] = {**(settings[part] or {}), **values} if values else values
    with pytest.raises(RefusedError, match=reason):
        fast_bpe(settings, np.dtype(np.uint16))


def test_digits_before_bytes_are_for_tokenizers():
    bpe = byte_level()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), last])
    choice = choose(wrapped(bpe), TEXTS)
    assert choice.reason.startswith("tokenizers, because the pre-tokenizer Digits + ByteLevel, as it is set,")
    assert_same(wrapped(bpe), choice.build(), nasty_texts())


@pytest.mark.parametrize("form", [normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD])
def test_normal_forms_are_taken(form):
    bpe = byte_level(QWEN_2, normalizers.Sequence([form()]))
    choice = choose(wrapped(bpe), TEXTS, "tiktoken")
    assert choice.name == "tiktoken", choice.reason
    assert_same(wrapped(bpe), choice.build(), nasty_texts())


def test_a_pattern_that_skips_text_is_refused():
    """tokenizers keeps what lies between matches, tiktoken would drop it."""
    bpe = byte_level(r"\p{L}+|\p{N}+|\s+")
    choice = choose(wrapped(bpe), TEXTS)
    assert choice.reason == "tokenizers, because tiktoken cannot be used: the pattern does not match all of the text"
    assert_same(wrapped(bpe), choice.build(), nasty_texts())


def test_the_classes_of_patterns():
    folded = [f"(?i:{letter})" for letter in "strevmld"]
    others = [r"[^\r\n\p{L}\p{N}]", r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"[\r\n]", r"\s", r"\S"]
    assert module._classes(LLAMA_3) == [*folded, *others]
    others = ["(?i:[sdmt])", "(?i:l)", "x", r"[\r\n/]", r"\-"]
    assert module._classes(r"'(?i:[sdmt]|ll)?+x{2,3}|(?:[\r\n/]*\-)++") == others


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            r"\p{N}{1,3}+",
            "^a",
            r"\s+$",
            ".+",
            r"\bx",
            r"\X",
            r"\h",
            r"(a)\1",
            "[[:alpha:]]",
            "[a&&b]",
            "[a[b]]",
            "a)b(c",
        ),
        *("(?<=a)b", "(?<!a)b", "(?>a)", "(?x) a", "(?i)a", "(?s:a)", "a{2}{3}", "a{,3}", "a+++"),
        *(r"(?i:\p{L})", "(?i:ss)", "(?i:x|st)", "(?i:fi)", "(?i:(?:\u00e9))"),  # there one letter may stand for two
    ],
)
def test_patterns_that_the_engines_read_differently_are_refused(pattern):
    with pytest.raises(RefusedError, match="differ"):
        module._classes(pattern)


@pytest.mark.parametrize("pattern", [r"\p{N}{1,3}+|[^\p{N}]", r"\s+$|\s|\S+", r"(?i:ss)|."])
def test_such_patterns_do_split_differently(pattern):
    """Or refusing them were for nothing."""
    text = "1234567 x\u00df  \n x"
    pieces = [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]
    table = {text[start:end].encode() for start in range(len(text)) for end in range(start + 1, len(text) + 1)}
    table |= {bytes([byte]) for byte in range(256)}
    ranks = {token: n for n, token in enumerate(sorted(table, key=len))}  # whatever the pieces are, they are tokens
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert [encoding.decode([token]) for token in encoding.encode(text)] != pieces


def test_the_faster_pattern_of_gpt2_splits_alike():
    """On every text of up to five signs that meet all of its branches."""
    texts = ["".join(signs) for length in range(1, 6) for signs in product("sl1 \n'.", repeat=length)]
    table = [*(bytes([byte]) for byte in range(256)), *(text.encode() for text in texts if len(text) > 1)]
    ranks = {token: n for n, token in enumerate(table)}  # all pieces are tokens: equal ids are equal pieces
    slow, fast = (
        tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for pattern in (GPT2_PATTERN, GPT2_PATTERN_FASTER)
    )
    assert all(slow.encode_ordinary(text) == fast.encode_ordinary(text) for text in texts)


def test_characters_are_compared_class_by_class():
    characters = "aB1\u00e9\u0416\u4e2d \U0001d7ce\U0010ffff\u00df\u212a"
    classes = CharacterClasses([r"\p{L}", r"[^\s\p{N}]", "(?i:k)"])
    assert classes.disagreeing(characters) == set()
    other = CharacterClasses([r"\p{Lu}"])._pairs[0]
    classes._pairs[0] = (classes._pairs[0][0], other[1])  # as of an engine that calls letters what is upper case
    assert classes.disagreeing(characters) == {"a", "\u00e9", "\u4e2d", "\u00df"}


def test_a_class_that_the_engines_read_differently_is_refused(monkeypatch):
    monkeypatch.setattr(CharacterClasses, "disagreeing", lambda _, characters: set(characters) & {"_"})
    with pytest.raises(RefusedError, match=r"another meaning there for \['_'\]"):
        plan(byte_level())


def test_a_class_that_an_engine_does_not_know_is_refused():
    """Oniguruma knows no \\p{Script_Extensions} and the like; here one that neither knows."""
    settings = json.loads(byte_level(QWEN_2).to_str())
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{Klingon}+|\P{Klingon}+"
    with pytest.raises(RefusedError, match="one of the libraries does not take the pattern"):
        fast_bpe(settings, np.dtype(np.uint16))


def test_added_tokens_are_looked_for_by_their_starts():
    bpe = byte_level(special=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</think>"])
    assert sorted(plan(bpe).added_starts()) == ["</think>", "<|"]
