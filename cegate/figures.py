"""Pictures of a run: what the gate chose, how training went, what the model sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cegate.config import IGNORE
from cegate.data.datasets import Item
from cegate.palette import default_palette
from cegate.runfolder import written_aside

Record = Mapping[str, Any]

PANEL_ROWS = 4
PANEL_SIDE_PX = 512
IGNORED_COLOUR = "#FFFFFF"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "text.color": "#222222",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
}
TITLES = {
    "spatial": "spatial · LoRA on query and value",
    "semantic": "semantic · adapter beside the MLP",
    "frequency": "frequency · Earth-Adapter",
}


def _save(figure: Figure, path: Path) -> None:
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150, facecolor="white")


def draw_gate(rounds: Sequence[Record], sites: Sequence[str], path: Path) -> None:
    """Draw the score of every site at every scoring round, and mark the chosen ones.

    Args:
        rounds: lines of gates.jsonl. Without scores (all sites, or fixed ones) only the choice is shown.
        sites: every site of the model, ``<kind>.<layer>``, in (kind, layer) order.
        path: PNG to write.
    """
    layers_of: dict[str, list[int]] = {}
    for site in sites:
        kind, _, layer = site.partition(".")
        layers_of.setdefault(kind, []).append(int(layer))
    scored = any(record["scores"] for record in rounds)
    value = np.array([[record["scores"].get(site, np.nan) for record in rounds] for site in sites], float)
    chosen = np.array([[site in record["active"] for record in rounds] for site in sites], bool)
    top = np.nanmax(value) if scored else 1.0
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(top, 1e-12))
    depth = max(len(layers) for layers in layers_of.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(layers_of) + 0.9, 1.5 + min(0.26 * depth, 6.2)), layout="constrained")
        axes = figure.subplots(1, len(layers_of), sharey=True, squeeze=False)[0]
        row = 0
        for ax, (kind, layers) in zip(axes, layers_of.items(), strict=True):
            rows = slice(row, row + len(layers))
            row += len(layers)
            image = ax.imshow(
                value[rows], aspect="auto", origin="lower", cmap="YlGnBu", norm=norm, interpolation="none"
            )
            _mark_chosen(ax, chosen[rows])
            _name_rounds(ax, rounds)
            mean = chosen[rows].sum(axis=0).mean()
            ax.set_title(TITLES.get(kind, kind), fontsize=9.5, pad=18)
            below_title = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
            ax.annotate(f"{mean:.3g} of {len(layers)} sites on", (0.5, 1.0), (0, 5), **below_title)
            ax.set_facecolor("#F1F4F3")
        axes[0].set_ylabel("layer")
        axes[0].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes[len(axes) // 2].set_xlabel("scoring round, by its iteration")
        if scored:
            bar = figure.colorbar(image, ax=list(axes), fraction=0.025, pad=0.01, aspect=38)
            bar.set_label("Fisher score")
            bar.outline.set_visible(False)
        figure.legend(
            handles=[Patch(facecolor="#D1495B", label="on until the next round")],
            loc="outside lower center",
            handlelength=0.8,
            handleheight=0.8,
        )
        _save(figure, path)


def _mark_chosen(ax: Axes, chosen: np.ndarray) -> None:
    """A bar in the middle of every chosen cell, so that choices that last form lines."""
    layers, rounds = np.nonzero(chosen)
    ax.barh(layers, width=np.full(len(layers), 0.96), left=rounds - 0.48, height=0.22, color="#D1495B", linewidth=0)
    ax.set_ylim(-0.5, chosen.shape[0] - 0.5)
    ax.set_xlim(-0.5, chosen.shape[1] - 0.5)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _name_rounds(ax: Axes, rounds: Sequence[Record]) -> None:
    step = -(-len(rounds) // 6)
    ticks = range(0, len(rounds), step)
    ax.set_xticks(list(ticks), [str(rounds[tick]["iteration"]) for tick in ticks])


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Draw training loss, and mIoU per domain; dashed is frozen backbone + head.

    Args:
        records: lines of metrics.jsonl.
        path: PNG to write.
    """
    domains = list(dict.fromkeys(r["domain"] for r in records if r["split"] in ("before", "after")))
    colours = dict(zip(domains, default_palette(len(domains)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        loss_ax, miou_ax = figure.subplots(1, 2)
        for stage, label, style, colour in (
            ("before", "frozen backbone + head", "--", "#999999"),
            ("after", "with gate", "-", "#0072B2"),
        ):
            train = [r for r in records if r["split"] == "train" and r["stage"] == stage]
            if train:
                loss_ax.plot(*_xy(train, "loss"), style, color=colour, label=label, linewidth=1.5)
            for domain in domains:
                points = [r for r in records if r["split"] == stage and r["domain"] == domain and r["mIoU"] is not None]
                if points:
                    name = domain if stage == "after" else None
                    marks = {"marker": "o", "markersize": 3.5, "linewidth": 1.5}
                    miou_ax.plot(*_xy(points, "mIoU"), style, color=colours[domain], label=name, **marks)
        loss_ax.set(title="training loss", xlabel="iteration")
        loss_ax.set_ylim(bottom=0)
        loss_ax.legend()
        miou_ax.set(title="mIoU (dashed: frozen backbone + head)", xlabel="iteration")
        miou_ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if domains:
            miou_ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for ax in (loss_ax, miou_ax):
            ax.grid(axis="y")
            ax.set_axisbelow(True)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _save(figure, path)


def _xy(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    return [r["iteration"] for r in records], [r[key] for r in records]


def draw_panels(
    items: Sequence[Item],
    predictions: Mapping[str, Sequence[np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[str],
    path: Path,
) -> None:
    """Draw image, truth and predictions side by side, one row per image, with a legend of the classes.

    Args:
        items: images with labels.
        predictions: column title -> one [H, W] uint8 mask per item.
        classes: names in the order of their indices.
        palette: one '#RRGGBB' per class.
        path: PNG to write.
    """
    colours = ListedColormap([*palette, IGNORED_COLOUR])
    columns = 2 + len(predictions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.35 * columns, 2.42 * len(items) + 0.55), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.01)
        axes = figure.subplots(len(items), columns, squeeze=False)
        for row, item in enumerate(items):
            step = -(-max(item.label.shape) // PANEL_SIDE_PX)
            masks = {"truth": item.label, **{title: masks[row] for title, masks in predictions.items()}}
            axes[row, 0].imshow(_picture(item.image)[::step, ::step], interpolation="none")
            for ax, (title, mask) in zip(axes[row, 1:], masks.items(), strict=True):
                shown = np.where(mask[::step, ::step] == IGNORE, len(classes), mask[::step, ::step])
                ax.imshow(shown, cmap=colours, vmin=-0.5, vmax=len(classes) + 0.5, interpolation="none")
                if title != "truth":
                    ax.set_xlabel(_right(mask, item.label), fontsize=8, labelpad=2)
            for ax, title in zip(axes[row], ("image", *masks), strict=True):
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if row == 0:
                    ax.set_title(title)
        used = [Patch(facecolor=c, edgecolor="#BBBBBB", label=n) for n, c in zip(classes, palette, strict=True)]
        if any((item.label == IGNORE).any() for item in items):
            used.append(Patch(facecolor=IGNORED_COLOUR, edgecolor="#BBBBBB", label="not labelled"))
        figure.legend(handles=used, loc="outside lower center", ncols=min(len(used), 2 * columns), handlelength=1.2)
        _save(figure, path)


def _picture(image: np.ndarray) -> np.ndarray:
    """[C, H, W] in 0..1 -> [H, W, 3] of the first three bands, or [H, W, 3] grey of one or two."""
    bands = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    return np.clip(np.moveaxis(bands, 0, -1), 0, 1)


def _right(mask: np.ndarray, label: np.ndarray) -> str:
    valid = label != IGNORE
    return f"{100 * (mask == label)[valid].mean():.0f} % of pixels right" if valid.any() else "not labelled"
