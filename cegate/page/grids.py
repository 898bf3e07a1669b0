"""Tables of numbers with a shade behind each: confusion, Fisher mass, choices, similarity of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LEVELS = 8
"""Steps of the heat ramp above zero; level 0 is no heat."""
NOTHING = "–"


class GridCell(NamedTuple):
    """A number with a shade."""

    text: str
    level: int = 0
    title: str = ""
    small: str = ""
    """A second, smaller number."""


@dataclass(frozen=True)
class Grid:
    """A table with a header row and a header column."""

    title: str
    caption: str
    """What the numbers are."""
    corner: str
    """What the header column holds."""
    columns: Sequence[str | int]
    rows: Sequence[tuple[str, Sequence[GridCell]]]
    notes: Sequence[str] = ()
    upright: bool = False
    """Long column names stand upright."""


def level_of(value: float | None, top: float = 1.0) -> int:
    """Heat level 0..LEVELS of a value, by its square root, so that small values are told apart."""
    return max(1, min(LEVELS, math.ceil(LEVELS * math.sqrt(value / top) - 1e-9))) if value and top > 0 else 0


def share_cell(value: float | None, title: str = "", small: str = "") -> GridCell:
    """A share 0..1 in percent, shaded."""
    return GridCell(percent_text(value), level_of(value), title, small)


def percent_text(value: float | None) -> str:
    """Whole percent from 10 on, one decimal below, so that small shares are told from none."""
    if value is None:
        return NOTHING
    return f"{100 * value:.0f}" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}"
