from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cegate.page.choice import share_of_mass
from cegate.page.grids import LEVELS, level_of, percent_text


@given(st.floats(0, 1), st.floats(0, 1))
def test_levels_rise_with_the_value(one, other):
    low, high = sorted((one, other))
    assert 0 <= level_of(low, 1.0) <= level_of(high, 1.0) <= LEVELS
    assert (level_of(high, 1.0) == 0) == (high == 0)


@pytest.mark.parametrize("top", [1e-12, 0.37, 5e4])
def test_levels_are_squares_of_the_top(top):
    edges = [top * (level / LEVELS) ** 2 for level in range(1, LEVELS + 1)]
    assert [level_of(edge, top) for edge in edges] == list(range(1, LEVELS + 1))
    assert level_of(None, top) == level_of(1.0, 0.0) == 0


def test_small_shares_are_told_from_none():
    assert [percent_text(share) for share in (None, 0.0, 0.004, 0.0996, 1.0)] == ["–", "0", "0.4", "10", "100"]


def test_shares_of_mass_sum_to_one():
    assert share_of_mass({"mass": {"spatial.0": 3.0, "spatial.1": 1.0}}) == {"spatial.0": 0.75, "spatial.1": 0.25}
    assert share_of_mass({"mass": {"spatial.0": 0.0}}) == share_of_mass({}) == {}
