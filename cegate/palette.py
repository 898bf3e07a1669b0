"""Colours of classes and kinds."""

from __future__ import annotations

# Okabe and Ito's colour-blind-safe set, then Tol's muted set for more classes
SAFE = (
    "#E69F00", "#009E73", "#0072B2", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7", "#999999",
    "#332288", "#88CCEE", "#44AA99", "#117733", "#DDCC77", "#CC6677", "#882255", "#AA4499",
)  # fmt: skip


def default_palette(classes: int) -> list[str]:
    """One '#RRGGBB' per class, repeating after sixteen."""
    return [SAFE[index % len(SAFE)] for index in range(classes)]
