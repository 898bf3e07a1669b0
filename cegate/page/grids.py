"""Tables of numbers with a shade behind each: confusion, Fisher mass, choices, similarity of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cegate.page.charts import level_of

NOTHING = "–"


@dataclass(frozen=True)
class GridCell:
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
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[GridCell]]]
    notes: Sequence[str] = field(default_factory=tuple)
    upright: bool = False
    """Long column names stand upright."""


def share_cell(value: float | None, *, top: float = 1.0, title: str = "", small: str = "") -> GridCell:
    """A share 0..1 in percent, shaded by its part of ``top``."""
    return GridCell(percent_text(value), level_of(value, top), title, small)


def percent_text(value: float | None) -> str:
    """Whole percent from 10 on, one decimal below, so that small shares are told from none."""
    if value is None:
        return NOTHING
    return f"{100 * value:.0f}" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}"
