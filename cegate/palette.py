"""Colours of classes and kinds."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe and Ito's colour-blind-safe set, then Tol's muted set for more classes
SAFE = (
    "#E69F00", "#009E73", "#0072B2", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#999999",
    "#332288", "#88CCEE", "#44AA99", "#117733", "#DDCC77", "#CC6677", "#882255", "#AA4499",
)  # fmt: skip


BACKGROUND = "#ECE7DA"
"""Of a first class of that name: paper, so that what is on it stands out."""


def palette_of(classes: Sequence[str]) -> list[str]:
    """One '#RRGGBB' per class where a configuration gives none."""
    if classes and classes[0].lower() == "background":
        return [BACKGROUND, *default_palette(len(classes) - 1)]
    return default_palette(len(classes))


def default_palette(classes: int) -> list[str]:
    """One '#RRGGBB' per class, repeating after sixteen."""
    return [SAFE[index % len(SAFE)] for index in range(classes)]
