"""The catalogue of published data sets."""

from __future__ import annotations

from rich.table import Table

from cegate.data.prepared import Counts
from cegate.data.published.base import Published
from cegate.data.published.binary import DEEPGLOBE, MASSACHUSETTS, WHU
from cegate.data.published.casid import CASID
from cegate.data.published.isprs import POTSDAM, RESCUE, VAIHINGEN
from cegate.data.published.loveda import LOVEDA
from cegate.data.published.mmhunan import MMHUNAN
from cegate.data.published.rescuenet import RESCUENET
from cegate.errors import ConfigError, nearest

CATALOGUE: dict[str, Published] = {
    published.name: published
    for published in (*(POTSDAM, VAIHINGEN, RESCUE, LOVEDA, RESCUENET, WHU, DEEPGLOBE, MASSACHUSETTS, CASID, MMHUNAN),)
}


def find_published(name: str) -> Published:
    """The set of that name.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    if name not in CATALOGUE:
        raise ConfigError(f"no data set is called {name!r}; known are {', '.join(CATALOGUE)}{nearest(name, CATALOGUE)}")
    return CATALOGUE[name]


def catalogue_table() -> Table:
    """Every set with its splits and published numbers."""
    table = Table(title="Published data sets", title_justify="left")
    for column in ("name", "what", "classes", "splits (images, and crops where they are cut)"):
        table.add_column(column, style="bold" if column == "name" else None)
    for published in CATALOGUE.values():
        splits = ", ".join(f"{split} {_numbers(counts)}" for split, counts in published.splits.items())
        table.add_row(published.name, published.title, str(len(published.classes)), splits)
    return table


def _numbers(counts: Counts) -> str:
    return f"{counts.images}" if counts.images == counts.files else f"{counts.images} ({counts.files})"


def describe(published: Published) -> str:
    """All about a set, as lines of text."""
    stored = ", ".join(f"{value} {meaning}" for value, meaning in published.stored.items())
    colours = ", ".join(f"{name} {c}" for name, c in zip(published.classes, published.palette, strict=True))
    return "\n".join(
        [
            f"{published.name}: {published.title}",
            f"from: {published.origin}",
            f"licence: {published.licence}",
            f"layout of the download: {published.layout}",
            f"classes: {colours}",
            f"values in the prepared labels: {stored}",
            *(f"split {split}: {_numbers(counts)}" for split, counts in published.splits.items()),
            *(f"--{name}: {setting.help}" for name, setting in published.settings.items()),
            f"prepare: cegate data prepare {published.name} --root DOWNLOADED --out FOLDER",
        ]
    )
