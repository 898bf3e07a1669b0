"""The picture of a matrix: every method's difference to the reference, with its interval."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cegate.figures import STYLE
from cegate.matrix.statistics import Difference
from cegate.matrix.summary import REFERENCE, Matrix
from cegate.palette import default_palette
from cegate.runfolder import written_aside

COLUMNS = 4
AVERAGE_COLOUR = "#222222"


def draw_differences(matrix: Matrix, path: Path) -> bool:
    """Draw a panel per setting: methods against points of difference to gate, a dot per domain and their average.

    Args:
        matrix: what to draw.
        path: PNG to write.

    Returns:
        Whether there was a difference to draw.
    """
    panels = {setting: _points(matrix, setting) for setting in matrix.settings}
    panels = {setting: points for setting, points in panels.items() if points}
    if not panels:
        return False
    methods = [m for m in matrix.methods if any(method == m for points in panels.values() for method, _ in points)]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len({domain for _, domain in points}) for points in panels.values())
    height = 0.9 + len(methods) * max(0.24, 0.11 * most)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 3.1 * columns, 0.3 + height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for number, (ax, (setting, points)) in enumerate(zip(axes, panels.items(), strict=False)):
            _draw_panel(ax, setting, methods, points, named=number % columns == 0)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        figure.supxlabel(f"difference to {REFERENCE} in points, 95 % interval", fontsize=9)
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=150, facecolor="white")
    return True


def _points(matrix: Matrix, setting: str) -> dict[tuple[str, str], Difference]:
    """(method, domain or ``average``) -> difference."""
    domains = matrix.domains_of(setting)
    points = {}
    for method in matrix.methods_of(setting):
        for domain in [*domains, *([None] if len(domains) > 1 else [])]:
            gap = matrix.difference([setting], method, domain) if method != REFERENCE else None
            if gap is not None:
                points[method, domain or "average"] = gap
    return points


def _draw_panel(
    ax: Axes, setting: str, methods: list[str], points: dict[tuple[str, str], Difference], *, named: bool
) -> None:
    domains = list(dict.fromkeys(domain for _, domain in points))
    palette = default_palette(len(domains))
    colours = {d: AVERAGE_COLOUR if d == "average" or len(domains) == 1 else palette[i] for i, d in enumerate(domains)}
    ax.axvline(0, color="#444444", linewidth=1.0, zorder=1)
    for (method, domain), gap in points.items():
        offset = (domains.index(domain) - (len(domains) - 1) / 2) * 0.7 / max(len(domains), 2)
        y, colour = methods.index(method) + offset, colours[domain]
        if gap.low is not None:
            ax.plot([100 * gap.low, 100 * gap.high], [y, y], color=colour, linewidth=1.1, alpha=0.8)
        marker = "D" if domain == "average" else "o"
        ax.plot(100 * gap.value, y, marker, color=colour, markersize=3.6)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_yticks(range(len(methods)), methods if named else [""] * len(methods))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.set_axisbelow(True)
    seeds = sorted({gap.seeds for gap in points.values()})
    count = f"n = {seeds[0]}" if len(seeds) == 1 else f"n = {seeds[0]} to {seeds[-1]}"
    ax.set_title(f"{setting} ({count})", fontsize=9)
    if len(domains) > 1:
        marks = [
            Line2D([], [], color=colours[d], marker="D" if d == "average" else "o", markersize=3.6, linestyle="none")
            for d in domains
        ]
        # below the panel, where no interval runs, and below the axis' numbers; the pad is in heights of the legend's
        # font, for a share of the panel is too little where that is low
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 2.7, "ncols": min(len(domains), 3)}
        ax.legend(marks, domains, fontsize=7, handlelength=1.2, columnspacing=1.2, **below)
