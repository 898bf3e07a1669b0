"""Geometry of the charts: from numbers to SVG path data and positions in percent.

A plot area is an SVG that stretches with the page (``preserveAspectRatio="none"``); text stands beside it as HTML, so
that it keeps its size on a phone. x runs in iterations, y downwards in the unit named at each function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cegate.page.reading import Round
from cegate.page.stability import mean

LEVELS = 8
"""Steps of the heat ramp above zero; level 0 is no heat."""
MOST_COLUMNS = 100
"""Columns of a heat map; more rounds share columns, which a screen could not tell apart anyway."""
GREY = 8
"""The series of what a line is compared with; the coloured ones are 0 to 7 and then repeat."""
HEIGHT = 100.0
"""y of the foot of a line chart; its head is 0."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A label on an axis."""

    percent: float
    """Position along the axis, from the left or from the top."""
    label: str


@dataclass(frozen=True)
class Line:
    """One series of a line chart."""

    name: str
    series: int
    """Which colour of the style sheet."""
    path: str
    dots: tuple[tuple[str, str], ...] = ()
    """(path of a dot, what it says) of every point that is marked."""
    dashed: bool = False
    last: str = ""
    """Its last value, for the legend."""
    listed: bool = True
    """Named in the legend; a dashed line of a coloured series is explained by the one it belongs to."""


@dataclass(frozen=True)
class LineChart:
    """Lines over iterations."""

    title: str
    width: int
    """Iterations on the x axis."""
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marker: int | None = None
    """Iteration of the model that counts."""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One column of a heat map's row."""

    x: int
    width: int
    level: int
    title: str


@dataclass(frozen=True)
class HeatRow:
    """One site."""

    layer: int
    cells: tuple[Cell, ...]
    mean: float
    last: float
    """Scores, mean over the rounds and of the last one, in percent of the widest bar."""
    title: str


@dataclass(frozen=True)
class HeatPanel:
    """One kind: a row per layer, deep layers on top."""

    kind: str
    rows: tuple[HeatRow, ...]
    on_path: str
    """Iterations during which a site is on, as lines in the middle of its row (a row is 10 high)."""
    caption: str


def level_of(value: float | None, top: float) -> int:
    """Heat level 0..LEVELS of a value, by its square root, so that small scores are told apart."""
    if not value or top <= 0:
        return 0
    return max(1, min(LEVELS, math.ceil(LEVELS * math.sqrt(value / top) - 1e-9)))


def level_edges(top: float) -> list[float]:
    """Upper end of every level above zero."""
    return [top * (level / LEVELS) ** 2 for level in range(1, LEVELS + 1)]


def short(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def ticks_between(low: float, high: float, most: int = 6) -> list[float]:
    """At most ``most`` + 1 round numbers in [low, high]."""
    return _multiples(low, high, _step(high - low, most)) if high > low else [low]


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5, 10, ... that goes at most ``most`` times into a span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(step for factor in (1, 2, 5, 10) if span / (step := factor * power) <= most * (1 + 1e-9))


def iteration_ticks(width: int) -> tuple[Tick, ...]:
    """Whole iterations along an x axis of ``width`` iterations."""
    values = [value for value in ticks_between(0, width) if value == int(value)]
    return tuple(Tick(round(100 * value / width, 3), f"{int(value):,}") for value in values)


def line_chart(
    title: str,
    series: Iterable[tuple[str, int, Points, bool]],
    *,
    width: int,
    low: float | None = None,
    high: float | None = None,
    percent: bool = False,
    dots: bool = False,
    marker: int | None = None,
    note: str = "",
) -> LineChart:
    """Lines over iterations.

    Args:
        title: heading of the chart.
        series: (name, number of its colour, points of (iteration, value), dashed) of each line; one without points is
            left out.
        width: iterations on the x axis.
        low, high: ends of the y axis; default: the round numbers around the values.
        percent: values are shares 0..1 and shown as percent.
        dots: mark every point of a coloured line, with its value as its title.
        marker: iteration at which a vertical line stands.
        note: a sentence below the heading.
    """
    kept = [(name, colour, list(points), dashed) for name, colour, points, dashed in series if points]
    values = [value for _, _, points, _ in kept for _, value in points]
    unit = 100.0 if percent else 1.0
    low, high, ticks = _axis([unit * value for value in values], low and low * unit, high and high * unit)

    def y(value: float) -> float:
        return HEIGHT * (high - unit * value) / (high - low)

    def dot(name: str, x: float, value: float) -> tuple[str, str]:
        return f"M{_point(x, y(value))}h0", f"{name}, iteration {x:.10g}: {_label(value, percent)}"

    lines = tuple(
        Line(
            name=name,
            series=colour if colour == GREY else colour % GREY,
            path=_path((x, y(value)) for x, value in points),
            dots=tuple(dot(name, *point) for point in points) if dots and colour != GREY else (),
            dashed=dashed,
            last=_label(points[-1][1], percent),
            listed=not dashed or colour == GREY,
        )
        for name, colour, points, dashed in kept
    )
    y_ticks = tuple(Tick(round(y(tick / unit), 3), f"{tick:g}") for tick in ticks)
    return LineChart(title, width, lines, iteration_ticks(width), y_ticks, marker, note)


def _axis(values: Sequence[float], low: float | None, high: float | None) -> tuple[float, float, list[float]]:
    """Ends of an axis and its ticks; an end that is not given is the nearest tick beyond the values."""
    bottom = min(values, default=0.0) if low is None else low
    top = max(values, default=1.0) if high is None else high
    top = top if top > bottom else bottom + 1.0
    step = _step(top - bottom, 5)
    bottom = math.floor(bottom / step + 1e-9) * step if low is None else bottom
    top = math.ceil(top / step - 1e-9) * step if high is None else top
    return bottom, top, _multiples(bottom, top, step)


def _label(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else short(value)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(_point(x, y) for x, y in points)


def _point(x: float, y: float) -> str:
    return f"{x:.10g} {round(y, 2):g}"


def heat_panels(rounds: Sequence[Round], sites: Sequence[str], end: int, measure: str) -> list[HeatPanel]:
    """A heat map of scores and choices per kind.

    Args:
        rounds: in order; at least one.
        sites: in (kind, layer) order.
        end: iteration at which the last choice ends.
        measure: what a score is, for titles.
    """
    means = {site: mean([choice.scores.get(site) for choice in rounds]) or 0.0 for site in sites}
    last = {site: rounds[-1].scores.get(site, 0.0) for site in sites}
    top = top_score(rounds)
    widest = max([*means.values(), *last.values()], default=0.0) or 1.0
    starts = [choice.iteration for choice in rounds]
    spans = list(pairwise([*starts, max(end, starts[-1] + 1)]))
    columns = _columns(len(rounds))
    kinds: dict[str, list[str]] = {}
    for site in sites:
        kinds.setdefault(site.partition(".")[0], []).append(site)
    panels = []
    for kind, members in kinds.items():
        rows = [
            HeatRow(
                layer=int(site.partition(".")[2]),
                cells=tuple(_cell(site, rounds, spans, column, top, measure) for column in columns),
                mean=round(100 * means[site] / widest, 2),
                last=round(100 * last[site] / widest, 2),
                title=f"{site}: mean {short(means[site])}, last round {short(last[site])}",
            )
            for site in reversed(members)
        ]
        on = [sum(site in choice.active for site in members) for choice in rounds]
        caption = (
            f"{short(mean(on))} of {len(members)} on"
            if len(set(on)) == 1
            else (f"{min(on)} to {max(on)} of {len(members)} on, {short(mean(on))} on average")
        )
        panels.append(HeatPanel(kind, tuple(rows), _on_path(members, rounds, spans), caption))
    return panels


def top_score(rounds: Sequence[Round]) -> float:
    """The largest score of any site in any round; 0 where nothing was scored."""
    return max((score for choice in rounds for score in choice.scores.values()), default=0.0)


def _columns(rounds: int) -> list[slice]:
    """Rounds that share a column of the heat map, as evenly as can be."""
    count = min(rounds, MOST_COLUMNS)
    ends = [round(rounds * number / count) for number in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


def _cell(
    site: str,
    rounds: Sequence[Round],
    spans: Sequence[tuple[int, int]],
    column: slice,
    top: float,
    measure: str,
) -> Cell:
    within = rounds[column]
    x, end = spans[column][0][0], spans[column][-1][1]
    score = mean([choice.scores.get(site) for choice in within])
    on = sum(site in choice.active for choice in within)
    state = ("on" if on else "off") if len(within) == 1 else f"on in {on} of {len(within)} rounds"
    scored = "" if score is None else f"{measure if len(within) == 1 else f'mean {measure}'} {short(score)}, "
    return Cell(x, end - x, level_of(score, top), f"{site}, iterations {x} to {end}: {scored}{state}")


def _on_path(sites: Sequence[str], rounds: Sequence[Round], spans: Sequence[tuple[int, int]]) -> str:
    """One line per unbroken stretch of rounds that chose a site; rows run from the last site to the first."""
    parts = []
    for row, site in enumerate(reversed(sites)):
        stretch: tuple[int, int] | None = None
        for choice, (start, end) in [*zip(rounds, spans, strict=True), (None, (0, 0))]:
            if choice is not None and site in choice.active:
                stretch = (stretch[0] if stretch else start, end)
            elif stretch:
                parts.append(f"M{stretch[0]} {10 * row + 5}H{stretch[1]}")
                stretch = None
    return "".join(parts)


def share_of_mass(choice: Round) -> Mapping[str, float]:
    """Site -> its share of all Fisher mass of a round; empty where nothing was measured."""
    total = math.fsum(choice.mass.values())
    return {site: mass / total for site, mass in choice.mass.items()} if total > 0 else {}
