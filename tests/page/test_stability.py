from __future__ import annotations

import statistics
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cegate.page.stability import between_rounds, between_runs, chance_jaccard, jaccard, mean, share_on, spread

CHOICES = st.frozensets(st.sampled_from([f"spatial.{layer}" for layer in range(6)]))


@given(CHOICES, CHOICES)
def test_jaccard_is_symmetric_and_one_only_for_equal_choices(one, other):
    index = jaccard(one, other)
    assert index == jaccard(other, one)
    assert (index == 1) == (one == other and bool(one))
    assert (index is None) == (not one and not other)


@pytest.mark.parametrize(("k", "sites"), [(1, 1), (1, 4), (3, 4), (2, 5), (5, 5)])
def test_chance_is_the_mean_over_all_pairs_of_choices(k, sites):
    choices = [frozenset(map(str, choice)) for choice in combinations(range(sites), k)]
    pairs = [jaccard(one, other) for one in choices for other in choices]
    assert chance_jaccard(k, sites) == pytest.approx(statistics.fmean(pairs))


def test_chance_of_an_impossible_choice_is_refused():
    with pytest.raises(ValueError, match=r"k=5 is not 1\.\.4"):
        chance_jaccard(5, 4)


def test_rounds_are_compared_with_the_one_before():
    a, b = frozenset("ab"), frozenset("bc")
    assert between_rounds([a, a, b]) == [1, pytest.approx(1 / 3)]
    assert between_rounds([a]) == []


def test_runs_are_compared_at_the_iterations_they_share():
    a, b, c = frozenset("ab"), frozenset("bc"), frozenset("xy")
    last, over_rounds = between_runs([{0: a, 10: b}, {0: a, 10: c, 20: b}, {}])
    assert last[0][1] == last[1][0] == 1
    assert over_rounds[0][1] == pytest.approx(0.5)
    assert last[2][0] is None and over_rounds[2][1] is None


def test_share_of_rounds():
    assert share_on([frozenset("a"), frozenset("ab")], "b") == 0.5
    assert share_on([], "b") is None


@given(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), max_size=6))
def test_mean_and_spread_are_those_of_the_known_values(values):
    known = [value for value in values if value is not None]
    assert mean(values) == (pytest.approx(statistics.fmean(known)) if known else None)
    assert spread(values) == (pytest.approx(statistics.stdev(known), abs=1e-9) if len(known) > 1 else None)
