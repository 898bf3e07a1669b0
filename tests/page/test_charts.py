from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cegate.page.charts import (
    GREY,
    LEVELS,
    MOST_COLUMNS,
    heat_panels,
    level_edges,
    level_of,
    line_chart,
    share_of_mass,
    ticks_between,
)
from cegate.page.reading import Round

SITES = ["spatial.0", "spatial.1", "frequency.0"]


def rounds_of(*choices: set[str], interval: int = 10) -> list[Round]:
    scores = dict.fromkeys(SITES, 0.25)
    return [Round(number * interval, scores, {}, frozenset(choice)) for number, choice in enumerate(choices)]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_few_even_and_within(low, span, most):
    high = low + span
    ticks = ticks_between(low, high, most)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert len(ticks) <= most + 1
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    gaps = [b - a for a, b in pairwise(ticks)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-3, abs=slack) for gap in gaps)


@given(st.floats(0, 1), st.floats(0, 1))
def test_levels_rise_with_the_value(one, other):
    low, high = sorted((one, other))
    assert 0 <= level_of(low, 1.0) <= level_of(high, 1.0) <= LEVELS
    assert (level_of(high, 1.0) == 0) == (high == 0)


@pytest.mark.parametrize("top", [1e-12, 0.37, 5e4])
def test_the_legend_names_the_upper_end_of_every_level(top):
    edges = level_edges(top)
    assert [level_of(edge, top) for edge in edges] == list(range(1, LEVELS + 1))
    assert level_of(None, top) == level_of(1.0, 0.0) == 0


@given(st.lists(st.sets(st.sampled_from(SITES)), min_size=1, max_size=12))
def test_the_lines_say_exactly_what_was_on(choices):
    rounds = rounds_of(*choices)
    end = 10 * len(rounds)
    drawn = set()
    for panel in heat_panels(rounds, SITES, end, "score"):
        layers = [row.layer for row in panel.rows]
        for x, y, to in re.findall(r"M(\d+) (\d+)H(\d+)", panel.on_path):
            site = f"{panel.kind}.{layers[int(y) // 10]}"
            drawn |= {(site, iteration) for iteration in range(int(x), int(to), 10)}
    assert drawn == {(site, choice.iteration) for choice in rounds for site in choice.active}


@pytest.mark.parametrize("count", [1, 6, 100, 101, 400])
def test_columns_cover_every_round_once(count):
    rounds = rounds_of(*[{"spatial.1"}] * count)
    (row, *_) = heat_panels(rounds, SITES, 10 * count, "score")[0].rows
    assert len(row.cells) == min(count, MOST_COLUMNS)
    assert row.cells[0].x == 0 and sum(cell.width for cell in row.cells) == 10 * count
    assert all(a.x + a.width == b.x for a, b in pairwise(row.cells))


def test_a_cell_tells_score_and_state():
    spatial, frequency = heat_panels(rounds_of({"spatial.1"}, {"frequency.0"}), SITES, 20, "share")
    assert spatial.rows[0].cells[0].title == "spatial.1, iterations 0 to 10: share 0.25, on"
    assert frequency.rows[0].cells[0].title == "frequency.0, iterations 0 to 10: share 0.25, off"
    assert spatial.caption == "0 to 1 of 2 on, 0.5 on average"


def test_choices_without_scores_are_shown():
    rounds = [Round(0, {}, {}, frozenset(["spatial.0"]))]
    (panel, _) = heat_panels(rounds, SITES, 50, "")
    assert panel.on_path == "M0 15H50"
    assert panel.rows[1].cells[0].title == "spatial.0, iterations 0 to 50: on"


def test_a_line_chart_spans_its_values():
    chart = line_chart("loss", [("a", 0, [(0, 2.0), (10, 0.5)], False), ("b", 9, [], False)], width=10, low=0.0)
    (line,) = chart.lines
    assert line.path == "M0 0L10 75" and line.last == "0.5"
    assert [tick.label for tick in chart.y_ticks] == ["0", "0.5", "1", "1.5", "2"]


def test_large_iterations_keep_every_digit():
    (line,) = line_chart("loss", [("a", 0, [(1234567, 1.0)], False)], width=1234567, dots=True).lines
    assert line.path.startswith("M1234567 ") and line.dots[0][1].startswith("a, iteration 1234567: ")


def test_a_share_is_labelled_in_percent_and_only_coloured_lines_have_dots():
    series = [("a", 9, [(0, 0.25)], False), ("chance", GREY, [(0, 0.1)], True)]
    coloured, grey = line_chart("share", series, width=10, percent=True, dots=True, marker=3).lines
    assert coloured.series == 1 and coloured.dots[0][1] == "a, iteration 0: 25.0"
    assert grey.series == GREY and not grey.dots and grey.listed


def test_shares_of_mass_sum_to_one():
    assert share_of_mass(Round(0, {}, {"spatial.0": 3.0, "spatial.1": 1.0}, frozenset())) == {
        "spatial.0": 0.75,
        "spatial.1": 0.25,
    }
    assert share_of_mass(Round(0, {}, {"spatial.0": 0.0}, frozenset())) == {}
