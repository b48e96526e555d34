"""Which documents are held out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clm_dist.data.split import document_digest, document_key, held_out_below


def held_out(texts, fraction, seed=0):
    keys = np.array([document_key(text.encode(), seed) for text in texts], dtype=np.uint64)
    bound = held_out_below(lambda: np.array_split(keys, 3), fraction)
    return [text for text, key in zip(texts, keys.tolist(), strict=True) if key < bound]


def test_the_share_is_exact():
    texts = [f"document {n}" for n in range(1000)]
    assert len(held_out(texts, 0.2)) == 200
    assert len(held_out(texts, 0.001)) == 1
    assert held_out(texts, 0) == []


def test_a_tiny_set_still_has_both_sides():
    assert len(held_out(["a", "b"], 0.01)) == 1
    assert len(held_out(["a", "b", "c"], 0.99)) == 2
    assert held_out(["a"], 0.5) == []  # one document: all of it is for training


def test_copies_are_held_out_together_or_not_at_all():
    texts = ["a"] * 50 + [f"document {n}" for n in range(50)]
    found = held_out(texts, 0.3)
    assert found.count("a") in (0, 50) and 0 < len(found) < 100
    assert held_out(["same"] * 10, 0.5) == []


@given(st.lists(st.text(max_size=8), min_size=2, max_size=60), st.floats(0.01, 0.9), st.randoms())
def test_copies_stay_together_and_the_order_of_files_is_nothing(texts, fraction, random):
    first = set(held_out(texts, fraction))
    shuffled = list(texts)
    random.shuffle(shuffled)
    assert set(held_out(shuffled, fraction)) == first


def nearest_bound(keys, fraction):
    """The same by sorting everything: of all bounds the one with nearest to the wanted number of documents below it."""
    distinct, copies = np.unique(keys, return_counts=True)
    below = np.cumsum(copies)[:-1]
    if fraction == 0 or not len(below):
        return 0
    return int(distinct[np.abs(below - int(fraction * len(keys) + 0.5)).argmin()]) + 1


@given(
    st.lists(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 5), st.integers(2**64 - 5, 2**64 - 1)), max_size=80),
    st.sampled_from([0, 0.001, 0.1, 0.2, 0.5, 0.9, 0.999]),
    st.integers(1, 4),
)
def test_the_bound_is_found_without_holding_all_keys(keys, fraction, batches):
    keys = np.array(keys, dtype=np.uint64)
    assert held_out_below(lambda: np.array_split(keys, batches), fraction) == nearest_bound(keys, fraction)


def test_key_and_digest_are_independent():
    """Their 128 bits together stand for a text where copies are looked for."""
    assert document_digest(b"a") != document_digest(b"b")
    assert document_digest(b"a") not in (document_key(b"a", 0), document_key(b"a", 42))


def test_the_seed_decides():
    texts = [f"document {n}" for n in range(100)]
    assert set(held_out(texts, 0.2, seed=1)) != set(held_out(texts, 0.2, seed=2))


def test_the_key_never_changes():
    """Written down once: another key would move documents from training into evaluation."""
    assert document_key(b"Why is the sky blue?", 42) == 16386143471034800989
