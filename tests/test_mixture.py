"""A mixture keeps its proportions at every document, and stops where it says."""

import random
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clm_dist.preparation.mixture import Taken, interleave
from clm_dist.preparation.packing import Documents

STOPS = ("first_exhausted", "all_exhausted")
WEIGHTS = [[1, 1], [0.7, 0.2, 0.1], [0.999, 0.001], [3, 1, 1, 1], [1e-5, 0.5], [2.5]]


def stream(lists, cuts=()):
    """A source that can be read again, in batches cut before these documents (twice the same: an empty batch)."""
    bounds = [0, *sorted(cut % (len(lists) + 1) for cut in cuts), len(lists)]

    def read():
        for first, last in pairwise(bounds):
            some = lists[first:last]
            ids = np.array([token for one in some for token in one], dtype=np.uint16)
            yield Documents(ids, np.array([len(one) for one in some], dtype=np.int64))

    return read


def mixed(sources, weights, stop, cuts=()):
    """The mixture as a list of documents (lists of ids), and what was taken."""
    batches, taken = [], None

    def run():
        nonlocal taken
        taken = yield from interleave([stream(one, cuts) for one in sources], weights, stop)

    for batch in run():
        assert len(batch.ids) == batch.lengths.sum()
        batches += [part.tolist() for part in np.split(batch.ids, np.cumsum(batch.lengths)[:-1])]
    return batches, taken


def numbered(lengths_of_sources):
    """Documents of these lengths; their ids say the source and the place: 1000 * source + document."""
    return [
        [[1000 * source + index] * length for index, length in enumerate(lengths)]
        for source, lengths in enumerate(lengths_of_sources)
    ]


def furthest_behind(tokens, _documents, weights):
    """The rule by its definition, in fractions."""
    return min(range(len(tokens)), key=lambda i: (tokens[i] / Fraction(str(weights[i])), i))


def slow_mixture(sources, weights, stop, choose=furthest_behind):
    """One document at a time from lists."""
    out, tokens, documents = [], [0] * len(sources), [0] * len(sources)
    while True:
        i = choose(tokens, documents, weights)
        if documents[i] == len(sources[i]) and stop == "first_exhausted":
            break
        one = sources[i][documents[i] % len(sources[i])]
        out.append(one)
        tokens[i] += len(one)
        documents[i] += 1
        if stop == "all_exhausted" and all(n >= len(one) for n, one in zip(documents, sources, strict=True)):
            break
    passes = [n // len(one) for n, one in zip(documents, sources, strict=True)]
    return out, [Taken(*one) for one in zip(documents, tokens, passes, strict=True)]


def within_bounds(out, sources, weights):
    """Whether at every document no source is further from its share than the docstring of `interleave` says."""
    shares = [Fraction(str(weight)) / sum(Fraction(str(one)) for one in weights) for weight in weights]
    longest = [max(map(len, one)) for one in sources]
    tokens = [0] * len(sources)
    for document in out:
        tokens[document[0] // 1000] += len(document)
        for i, p in enumerate(shares):
            above = tokens[i] - p * sum(tokens)
            if not -p * (sum(longest) - longest[i]) <= above <= (1 - p) * longest[i]:
                return False
    return True


def test_by_hand():
    """A's documents have 1 token, B's 2, and they share alike; where both are level, A has the turn."""
    a, b = [[1], [2], [3], [4]], [[10, 10], [11, 11], [12, 12]]
    out, taken = mixed([a, b], [1, 1], "first_exhausted")
    assert out == [[1], [10, 10], [2], [3], [11, 11], [4]]  # then both have 4: the turn is A's, which is at its end
    assert taken == [Taken(4, 4, 1), Taken(2, 4, 0)]


def test_seven_two_one_by_hand():
    """A token moves the clocks by 2, 7 and 14 (1/0.7 : 1/0.2 : 1/0.1), and they are level after every ten."""
    sources = [[[0]] * 50, [[1]] * 50, [[2]] * 50]
    out, _ = mixed(sources, [0.7, 0.2, 0.1], "first_exhausted")
    ten = [[0], [1], [2], [0], [0], [0], [1], [0], [0], [0]]
    assert out[:50] == ten * 5
    assert mixed(sources, [7, 2, 1], "first_exhausted")[0] == out  # only proportions matter


def test_a_small_source_is_repeated_by_hand():
    a, b = [[1], [2]], [[10], [11], [12], [13], [14]]
    out, taken = mixed([a, b], [1, 1], "all_exhausted")
    assert out == [[1], [10], [2], [11], [1], [12], [2], [13], [1], [14]]
    assert taken == [Taken(5, 5, 2), Taken(5, 5, 1)]
    out, taken = mixed([a, b], [1, 1], "first_exhausted")
    assert out == [[1], [10], [2], [11]]
    assert taken == [Taken(2, 2, 1), Taken(2, 2, 0)]


def test_sources_that_end_together():
    """Both stops agree, and neither reads anything twice."""
    sources = [[[1], [2]], [[10], [11]]]
    for stop in STOPS:
        assert mixed(sources, [1, 1], stop) == ([[1], [10], [2], [11]], [Taken(2, 2, 1)] * 2)


@pytest.mark.parametrize("stop", STOPS)
def test_one_source_is_itself(stop):
    lists = numbered([[3, 1, 2] * 700])[0]
    assert mixed([lists], [0.3], stop, cuts=[1000]) == (lists, [Taken(2100, 4200, 1)])


@pytest.mark.parametrize("stop", STOPS)
def test_an_empty_source_ends_it(stop):
    """Never for ever, and the caller sees who was empty."""
    for empty in ([], [[]], [[], []]):
        out, taken = mixed([[[1], [2]], empty], [1, 1], stop)
        assert out == [[1]]
        assert taken == [Taken(1, 1, 0), Taken(0, 0, 0)]
        assert mixed([empty, [[1]]], [1, 1], stop) == ([], [Taken(0, 0, 0)] * 2)
    assert mixed([], [], stop) == ([], [])


def test_a_source_that_gives_nothing_the_second_time_ends_it():
    """As an iterator does that was handed over as if it could be read again."""
    once = iter([Documents(np.array([1], dtype=np.uint16), np.array([1]))])
    batches = list(interleave([lambda: once, stream([[2]] * 5)], [1, 1], "all_exhausted"))
    assert [batch.ids.tolist() for batch in batches] == [[1, 2]]


@pytest.mark.parametrize("weights", [[0, 1], [-1, 1], [float("nan"), 1], [float("inf"), 1], [1]])
def test_weights_must_be_positive_numbers_one_for_each_source(weights):
    with pytest.raises(ValueError):
        mixed([[[1]], [[2]]], weights, "all_exhausted")


sources_and_weights = st.sampled_from(WEIGHTS).flatmap(
    lambda weights: st.tuples(
        st.lists(
            st.lists(st.integers(1, 20), min_size=1, max_size=30), min_size=len(weights), max_size=len(weights)
        ).map(numbered),
        st.just(weights),
    )
)


@settings(max_examples=200)
@given(sources_and_weights, st.lists(st.integers(0, 30), max_size=6))
def test_first_exhausted_is_its_definition(given_, cuts):
    """Equal to the slow reference, however the sources came; each source in order; shares right at every document."""
    sources, weights = given_
    out, taken = mixed(sources, weights, "first_exhausted", cuts)
    assert (out, taken) == slow_mixture(sources, weights, "first_exhausted")
    assert within_bounds(out, sources, weights)
    for index, (lists, one) in enumerate(zip(sources, taken, strict=True)):
        assert [document for document in out if document[0] // 1000 == index] == lists[: one.documents]


@settings(max_examples=200)
@given(
    st.sampled_from([[1, 1], [0.7, 0.2, 0.1], [0.9, 0.1], [3, 1, 1, 1]]).flatmap(
        lambda weights: st.tuples(
            st.lists(
                st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=len(weights), max_size=len(weights)
            ).map(numbered),
            st.just(weights),
        )
    ),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_all_exhausted_is_its_definition(given_, cuts):
    """The same, and each source comes whole, repeated from its start."""
    sources, weights = given_
    out, taken = mixed(sources, weights, "all_exhausted", cuts)
    assert (out, taken) == slow_mixture(sources, weights, "all_exhausted")
    assert within_bounds(out, sources, weights)
    assert min(one.passes for one in taken) == 1
    for index, (lists, one) in enumerate(zip(sources, taken, strict=True)):
        expected = [lists[i % len(lists)] for i in range(one.documents)]
        assert [document for document in out if document[0] // 1000 == index] == expected


def lengths_of(count, seed):
    return np.random.default_rng(seed).integers(1, 100, count).tolist()


def test_chance_and_turn_about_do_not_keep_shares():
    """Two mutants that the bounds catch: drawing by weight, and equal numbers of unequal documents."""
    sources = numbered([lengths_of(900, 1), [9 * length for length in lengths_of(900, 2)]])
    draw = random.Random(0)

    def by_chance(_tokens, _documents, weights):
        return draw.choices(range(len(weights)), weights)[0]

    def turn_about(_tokens, documents, _weights):
        return documents.index(min(documents))

    for weights, choose in (([0.7, 0.3], by_chance), ([1, 1], turn_about)):
        assert within_bounds(mixed(sources, weights, "first_exhausted")[0], sources, weights)
        assert not within_bounds(slow_mixture(sources, weights, "first_exhausted", choose)[0], sources, weights)


def test_floats_break_ties():
    """A mutant that exactness catches: 21 / 0.7 and 3 / 0.1 are both 30, but not in floating point."""

    def in_floats(tokens, _documents, weights):
        return min(range(len(tokens)), key=lambda i: (tokens[i] / weights[i], i))

    sources = numbered([[1] * 30, [1] * 30])
    exact, _ = mixed(sources, [0.7, 0.1], "first_exhausted")
    drifting, _ = slow_mixture(sources, [0.7, 0.1], "first_exhausted", in_floats)
    assert exact[:24] == drifting[:24]
    assert (exact[24][0], drifting[24][0]) == (21, 1003)  # level: the first has the turn


def test_batches_hold_a_thousand_documents_or_a_million_tokens():
    short, long = numbered([[3] * 900] * 5), numbered([[300_000] * 6] * 2)
    sizes = [len(one.lengths) for one in interleave([stream(one) for one in short], [1] * 5, "all_exhausted")]
    assert sizes == [1000] * 4 + [500]
    sizes = [len(one.lengths) for one in interleave([stream(one) for one in long], [1, 1], "all_exhausted")]
    assert sizes == [4, 4, 4]


def test_memory_is_flat():
    """Fifteen times the passes over the small source, the same memory."""

    def peak(batches):
        def large():
            for _ in range(batches):
                yield from stream([[7] * 20] * 100)()

        tracemalloc.start()
        for _ in interleave([large, stream([[5] * 10] * 50)], [0.5, 0.5], "all_exhausted"):
            pass
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    assert peak(300) < 1.3 * peak(20)
