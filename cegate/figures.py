"""Pictures of a run, for its folder and its page alike: what the gate chose, how training went, what the model sees."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cegate.config import IGNORE
from cegate.configfile import domain_title
from cegate.runfolder import written_aside
from cegate.sites import SiteId, kinds

Record = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

STAGES = {"before": "frozen", "after": "gate"}
"""Stage, as journals and checkpoints name it -> as readers know it."""
PANEL_ROWS = 4
PANEL_SIDE_PX = 512
RESTORED = "restored.png"
"""Name of the picture of what tasks make of training crops."""
IGNORED_COLOUR, HOLE = "#FFFFFF", "#F3C9A5"
HEIGHTS = matplotlib.colormaps["gray"].with_extremes(bad=HOLE)
"""Of one band of a second raster."""
INK, SOFT, RULE, GREY, ON = "#1c2226", "#59646b", "#dfe2df", "#8b949a", "#d55e00"
LINES = ("#0072b2", "#c85200", "#00805d", "#a2558a", "#a06f00", "#3f8fbf", "#4b3fa5", "#882255")
HEAT = LinearSegmentedColormap.from_list("heat", [(0.16, 0.5, 0.69, alpha) for alpha in (0.05, 1.0)])
"""A tint rather than a ramp of colours, so that it stands on a light and on a dark page."""
DARK = {INK: "#e3e7e8", SOFT: "#9aa5ab", RULE: "#2c3338", GREY: "#7f8a91", ON: "#f0621a"} | dict(
    zip(LINES, ["#56b4e9", "#f08a4b", "#3fc49b", "#dda0c4", "#e4b548", "#a9d8f3", "#a49bec", "#dc85a6"], strict=True)
)
"""Colour on a light page -> on a dark one."""
MARKER = {"color": INK, "linewidth": 1.1, "linestyle": ":", "clip_on": False}
"""Of the iteration of the model that counts."""
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": SOFT,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": RULE,
    "legend.frameon": False,
    "svg.hashsalt": "cegate",
}


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a whole PNG or nothing."""
    with written_aside(path) as aside, matplotlib.rc_context(STYLE):
        if (layout := figure.get_layout_engine()) is not None:  # which savefig would run twice, and draw for nothing
            layout.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(aside, format="png", dpi=150, facecolor="white")


def svg_uri(figure: Figure) -> str:
    """data: URI of a figure as SVG, in the reader's light or dark colours; equal figures give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", dpi=150, facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    rules = {"light": "", "dark": ""}
    for light, dark in DARK.items():
        name = f"--c{light[1:]}"
        text = text.replace(light, f"var({name})")
        rules["light"] += f"{name}:{light};"
        rules["dark"] += f"{name}:{dark};"
    style = "<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>".format(**rules)
    encoded = base64.b64encode(text.replace("<defs>", f"{style}<defs>", 1).encode()).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"


# --- names ----------------------------------------------------------------------------------------------------------


def in_order(sites: Iterable[str]) -> list[SiteId]:
    """Sites by kind, stream and layer, as they are drawn: a panel for each kind and stream."""
    return sorted(map(SiteId, sites), key=lambda site: (kinds().index(site.kind), site.stream or "", site.layer))


def site_groups(sites: Iterable[str]) -> dict[str, dict[int, str]]:
    """Kind, or kind and stream -> layer -> site, in the order of the sites: what is drawn or tabled as one panel."""
    ids, groups = list(map(SiteId, sites)), {}
    several = any(site.stream for site in ids)
    for site in ids:
        title = f"{site.kind} · {site.stream or 'image'}" if several else site.kind
        groups.setdefault(title, {})[site.layer] = site
    return groups


def headline(record: Record) -> tuple[str, float | None]:
    """What an evaluation is led by, and its value 0..1: IoU of the one class beside ``background``, else mIoU."""
    classes = list(record.get("per_class", ()))
    if len(classes) == 2 and classes[0].lower() == "background":
        return f"IoU of {classes[1]}", record["per_class"][classes[1]]["IoU"]
    return "mIoU", record["mIoU"]


# --- the gate -------------------------------------------------------------------------------------------------------


def gate_figure(
    rounds: Sequence[Record],
    sites: Sequence[str],
    *,
    end: int | None = None,
    marker: int | None = None,
    measure: str = "Fisher score",
    columns: int | None = None,
) -> Figure:
    """The score of every site over the iterations, and when it was on: a panel per kind and stream.

    Args:
        rounds: lines of gates.jsonl, in order. Without scores (all sites, or fixed ones) only the choice is shown.
        sites: every site of the model, in order.
        end: iteration at which the last choice ends; default: as far from its round as the two last rounds are apart.
        marker: iteration of the model that counts.
        measure: what a score is.
        columns: panels side by side; default: one per kind, so that streams are rows.
    """
    ids = list(map(SiteId, sites))
    streams = list(dict.fromkeys(site.stream for site in ids))
    groups = site_groups(sites if columns else sorted(ids, key=lambda site: streams.index(site.stream)))
    columns = min(columns or len({site.kind for site in ids}), len(groups))
    starts = [record["iteration"] for record in rounds]
    edges = [*starts, max(end or 2 * starts[-1] - starts[-2 if len(starts) > 1 else -1], starts[-1] + 1)]
    top = max((score for record in rounds for score in record["scores"].values()), default=0.0)
    depth, grid_rows = max(map(len, groups.values())), -(-len(groups) // columns)
    height = 0.75 + depth * (0.2 if depth <= 12 else 0.13)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 3.1 * columns, 0.6 + height * grid_rows), layout="constrained")
        axes = figure.subplots(grid_rows, columns, squeeze=False)
        for ax in axes.flat[len(groups) :]:
            ax.set_visible(False)
        for ax, (title, members) in zip(axes.flat, groups.items(), strict=False):
            chosen = np.array([[site in record["active"] for record in rounds] for site in members.values()])
            scores = np.array([[r["scores"].get(site, np.nan) for r in rounds] for site in members.values()], float)
            norm = PowerNorm(0.5, 0.0, top or 1.0)
            heat = ax.pcolormesh(edges, np.arange(len(members) + 1) - 0.5, scores, cmap=HEAT, norm=norm)
            heat.set_rasterized(True)
            spans = [(row, *span) for row, states in enumerate(chosen) for span in _stretches(states, edges)]
            ax.hlines(*zip(*spans, strict=True), color=ON, linewidth=2.2) if spans else None
            if marker is not None:
                ax.axvline(marker, **MARKER)
            per_round = chosen.sum(axis=0)
            ax.set_title(title, pad=5)
            mean = "" if len(set(per_round)) == 1 else ", mean over rounds"
            ax.set_title(f"{per_round.mean():.3g} of {len(members)} on{mean}", loc="right", fontsize=8, weight="normal")
            ax.set(xlim=(edges[0], edges[-1]), ylim=(-0.5, len(members) - 0.5))
            step = -(-len(members) // 12)
            ax.set_yticks(range(0, len(members), step), [str(layer) for layer in list(members)[::step]])
            ax.spines[:].set_visible(False)
            ax.set_facecolor("#88888818")
            ax.tick_params(length=0)
            _whole_iterations(ax)
        for ax in axes[:, 0]:
            ax.set_ylabel("layer")
        handles = [Line2D([], [], color=ON, linewidth=2.2, label="on")] if any(r["active"] for r in rounds) else []
        if marker is not None:
            handles.append(Line2D([], [], label="model shown", **MARKER))
        if handles:
            figure.legend(handles=handles, loc="outside lower right", ncols=2)
        if top > 0:
            bar = figure.colorbar(heat, ax=axes, fraction=0.03, pad=0.02, aspect=30)
            bar.set_label(measure)
            bar.outline.set_visible(False)
            bar.solids.set_rasterized(True)
    return figure


def _stretches(states: Iterable[bool], edges: Sequence[int]) -> list[tuple[int, int]]:
    """(from, to) of every unbroken stretch of rounds that are on."""
    spans = groupby(zip(states, pairwise(edges), strict=True), key=lambda item: item[0])
    found = [(state, [span for _, span in group]) for state, group in spans]
    return [(group[0][0], group[-1][1]) for state, group in found if state]


def draw_gate(rounds: Sequence[Record], sites: Sequence[str], path: Path) -> None:
    """Write `gate_figure` as PNG."""
    save_png(gate_figure(rounds, sites), path)


# --- curves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A line over iterations."""

    name: str
    points: Points
    colour: str
    dashed: bool = False
    named: bool = True
    """In the legend."""


@dataclass(frozen=True)
class Chart:
    """Curves over iterations that share an axis."""

    title: str
    curves: Sequence[Curve]
    low: float | None = None
    high: float | None = None
    """Ends of the value axis; default: around the values."""
    dots: bool = False
    form: str = ".3g"
    """How the last values are written in the legend."""


def run_charts(records: Sequence[Record], method: str = STAGES["after"]) -> list[Chart]:
    """Training loss, and the leading score of every domain in percent, from lines of metrics.jsonl; dashed is the
    frozen backbone. ``method`` is what the second stage is called."""

    def losses(stage: str, key: str) -> Points:
        train = [r for r in records if r["split"] == "train" and r["stage"] == stage]
        return [(r["iteration"], r[key]) for r in train if r.get(key) is not None]

    def scores(stage: str, domain: str) -> Points:
        measured = [
            (r["iteration"], headline(r)[1]) for r in records if (r["split"], r.get("domain")) == (stage, domain)
        ]
        return [(iteration, 100 * score) for iteration, score in measured if score is not None]

    evaluated = [record for record in records if record["split"] in STAGES]
    domains = list(dict.fromkeys(record["domain"] for record in evaluated))
    loss = [
        Curve("frozen", losses("before", "loss"), GREY, dashed=True),
        Curve(method, losses("after", "loss"), LINES[0]),
        Curve("mixed images", losses("after", "mixed"), LINES[1]),
    ]
    score = []
    for number, domain in enumerate(domains):
        colour = LINES[number % len(LINES)]
        score.append(Curve(domain_title(domain), scores("after", domain), colour))
        score.append(Curve("frozen", scores("before", domain), colour, dashed=True, named=False))
    frozen = any(curve.points for curve in score if curve.dashed)
    title = f"{' and '.join(dict.fromkeys(headline(r)[0] for r in evaluated)) or 'mIoU'}, %"
    charts = [
        Chart("training loss", loss, low=0.0),
        Chart(f"{title} (dashed: frozen)" if frozen else title, score, dots=True, form=".1f"),
    ]
    return [chart for chart in charts if any(curve.points for curve in chart.curves)]


def chart_figure(charts: Sequence[Chart], *, width: int | None = None, marker: int | None = None) -> Figure:
    """Charts side by side, up to iteration ``width``; ``marker`` is the iteration of the model that counts."""
    last = [x for chart in charts for curve in chart.curves for x, _ in curve.points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * max(len(charts), 1), 3.2), layout="constrained")
        for ax, chart in zip(figure.subplots(1, max(len(charts), 1), squeeze=False)[0], charts, strict=False):
            for curve in chart.curves:
                if curve.points:
                    label = f"{curve.name}  {curve.points[-1][1]:{chart.form}}" if curve.named else None
                    dot = "o" if chart.dots or len(curve.points) == 1 else None
                    style = {"linestyle": "--" if curve.dashed else "-", "color": curve.colour, "marker": dot}
                    ax.plot(*zip(*curve.points, strict=True), label=label, linewidth=1.5, markersize=3.2, **style)
            if marker is not None:
                ax.axvline(marker, label="model shown", **MARKER)
            ax.set_title(chart.title)
            ax.set(xlim=(0, width or max(last, default=1)), ylim=(chart.low, chart.high))
            ax.grid(axis="y")
            ax.set_axisbelow(True)
            ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
            _whole_iterations(ax)
            names = len(ax.get_legend_handles_labels()[1])
            ax.legend(
                loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=min(names, 2), fontsize=8
            ) if names else None
    return figure


def _whole_iterations(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("iteration")


def draw_curves(records: Sequence[Record], path: Path, method: str = STAGES["after"]) -> None:
    """Write `run_charts` of the lines of metrics.jsonl as PNG."""
    save_png(chart_figure(run_charts(records, method)), path)


# --- what the model sees --------------------------------------------------------------------------------------------


def draw_panels(
    items: Sequence[Any],
    predictions: Mapping[str, Sequence[np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[str],
    path: Path,
    second: str = "second raster",
) -> None:
    """Draw image, second raster, truth and predictions side by side, one row per image, with a legend of the classes.

    Args:
        items: images with labels (`cegate.data.sets.Item`).
        predictions: column title -> one [H, W] uint8 mask per item.
        classes: names in the order of their indices.
        palette: one '#RRGGBB' per class.
        path: PNG to write.
        second: what the second raster is called, where items have one.
    """
    colours = ListedColormap([*palette, IGNORED_COLOUR])
    has_second = any(item.second for item in items)
    columns = 2 + has_second + len(predictions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.35 * columns, 2.42 * len(items) + 0.55), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.01, rect=(0, 0, 1, 0.985))
        axes = figure.subplots(len(items), columns, squeeze=False)
        for row, item in enumerate(items):
            step = -(-max(item.label.shape) // PANEL_SIDE_PX)
            masks = {"truth": item.label, **{STAGES.get(title, title): of[row] for title, of in predictions.items()}}
            axes[row, 0].imshow(_picture(item.image)[::step, ::step], interpolation="none")
            if has_second:
                beside = item.image[len(item.image) - item.second][::step, ::step]
                axes[row, 1].imshow(beside, cmap=HEIGHTS, vmin=0, vmax=1, interpolation="none")
            for ax, (title, mask) in zip(axes[row, 1 + has_second :], masks.items(), strict=True):
                shown = np.where(mask[::step, ::step] == IGNORE, len(classes), mask[::step, ::step])
                ax.imshow(shown, cmap=colours, vmin=-0.5, vmax=len(classes) + 0.5, interpolation="none")
                if title != "truth":
                    ax.set_xlabel(_how_right(mask, item.label, classes), fontsize=8, labelpad=2)
            for ax, title in zip(axes[row], ("image", *([second] if has_second else []), *masks), strict=True):
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if row == 0:
                    ax.set_title(title, loc="center")
        used = [Patch(facecolor=c, edgecolor="#BBBBBB", label=n) for n, c in zip(classes, palette, strict=True)]
        if any((item.label == IGNORE).any() for item in items):
            used.append(Patch(facecolor=IGNORED_COLOUR, edgecolor="#BBBBBB", label="not labelled"))
        if any(np.isnan(item.image[len(item.image) - item.second :]).any() for item in items):
            used.append(Patch(facecolor=HOLE, edgecolor="#BBBBBB", label=f"no {second}"))
        figure.legend(handles=used, loc="outside lower center", ncols=min(len(used), 2 * columns), handlelength=1.2)
    save_png(figure, path)


def draw_images(columns: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """Write images [C, H, W] in 0..1 side by side: a column per title, a row per image."""
    rows = len(next(iter(columns.values())))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.35 * len(columns), 2.35 * rows + 0.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.01)
        for across, (title, images) in zip(
            figure.subplots(rows, len(columns), squeeze=False).T, columns.items(), strict=True
        ):
            across[0].set_title(title, loc="center")
            for ax, image in zip(across, images, strict=True):
                step = -(-max(image.shape[1:]) // PANEL_SIDE_PX)
                ax.imshow(_picture(image)[::step, ::step], interpolation="none")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
    save_png(figure, path)


def _picture(image: np.ndarray) -> np.ndarray:
    """[C, H, W] in 0..1 -> [H, W, 3] of the first three bands, or [H, W, 3] grey of one or two."""
    bands = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    return np.clip(np.moveaxis(bands, 0, -1), 0, 1)


def _how_right(mask: np.ndarray, label: np.ndarray, classes: Sequence[str]) -> str:
    """IoU of the foreground of a binary task, share of the right pixels of others."""
    valid = label != IGNORE
    if not valid.any():
        return "not labelled"
    if len(classes) == 2 and classes[0].lower() == "background":
        either = ((mask == 1) | (label == 1)) & valid
        right = ((mask == 1) & (label == 1))[either]
        return f"IoU of {classes[1]} {100 * right.mean():.0f} %" if either.any() else f"no {classes[1]} here"
    return f"{100 * (mask == label)[valid].mean():.0f} % of pixels right"
