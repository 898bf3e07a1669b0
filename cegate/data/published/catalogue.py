"""The catalogue of published data sets, a table: sets.yaml."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from cegate.data.prepared import Counts
from cegate.data.published.casid import plan_casid
from cegate.data.published.downloads import Member
from cegate.data.published.plan import Options, Plan, Published, Setting, plan_pairs, plan_tiles
from cegate.errors import ConfigError, nearest

PLANNERS: dict[str, Callable[[Published, Sequence[Member], Options], Plan]] = {
    "pairs": plan_pairs,
    "tiles": plan_tiles,
    "casid": plan_casid,
}


def plan_of(published: Published, members: Sequence[Member], options: Options) -> Plan:
    """What the files of a download become."""
    return PLANNERS[published.row["plan"]](published, members, options)


def _published(name: str, row: Mapping[str, Any]) -> Published:
    classes, colours = zip(*(pair.split() for pair in row["classes"].split(", ")), strict=True)
    stored = {row["first"] + k: of for k, of in enumerate(classes)}
    if "ignored" in row:
        ignored = {row["ignored"]: "ignore"}
        stored = stored | ignored if row["ignored"] > max(stored) else ignored | stored
    settings = {
        option: Setting(*(tuple(v) if isinstance(v, list) else v for v in values))
        for option, values in row.get("options", {}).items()
    }
    if side := row.get("crop"):
        settings = {"crop": Setting(side, f"Side of the crops in pixels (default {side}).")} | settings
    splits = {split: Counts(*counts) for split, counts in row["splits"].items()}
    told = (row[key] for key in ("title", "origin", "licence", "layout"))
    return Published(name, *told, classes, tuple(f"#{c}" for c in colours), stored, splits, settings, row)


_TABLE = yaml.safe_load(Path(__file__).with_name("sets.yaml").read_text())
CATALOGUE: dict[str, Published] = {name: _published(name, row) for name, row in _TABLE.items()}


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
