"""Miniatures of the published sets, and what `prepare` makes of them; each is made once."""

from __future__ import annotations

import io
from functools import cache

import pytest
from rich.console import Console

from cegate.data.published.catalogue import find_published
from cegate.data.published.miniature import CROPS, generate
from cegate.data.published.prepare import prepare

# side lengths of the Vaihingen tiles, as published
VAIHINGEN = (
    "1:1919x2569 2:2428x2767 3:2006x3007 4,5,6,7,8,10:1887x2557 11:1893x2566 12:1922x2575 13:2818x2558 "
    "14,15,16:1919x2565 17:2336x1281 20:1866x2315 21,22,23,24:1903x2546 26:2995x1783 27:1917x3313 28:1917x2567 "
    "29:1917x2563 30:1934x2563 31,32:1980x2555 33:1581x2555 34:1388x2555 35:2805x1884 37:1996x1995 38:3816x2550"
)


@pytest.fixture(scope="session")
def vaihingen_sizes():
    """Area -> side lengths in pixels."""
    groups = [group.split(":") for group in VAIHINGEN.split()]
    return {area: tuple(map(int, size.split("x"))) for areas, size in groups for area in areas.split(",")}


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """Name -> folder in the layout of the download; not to be written to."""

    @cache
    def make(name):
        name = {"potsdam-rescue": "isprs-potsdam"}.get(name, name.removesuffix("-dsm"))
        folder = tmp_path_factory.mktemp("downloads") / name
        generate(name, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def prepare_set():
    """Prepare from Python: text of the console, and the manifest."""

    def run(name, root, out, *, partial_data=True, dry_run=False, workers=1, **options):
        published = find_published(name)
        given = {"crop": str(CROPS[name])} if name in CROPS else {}
        given |= {key: str(value) for key, value in options.items()}
        console = Console(file=io.StringIO(), width=200)
        roots = root if isinstance(root, list) else [root]
        manifest = prepare(
            published,
            roots,
            out,
            published.parse_options(given),
            partial_data=partial_data,
            dry_run=dry_run,
            workers=workers,
            console=console,
        )
        return console.file.getvalue(), manifest

    return run


@pytest.fixture(scope="session")
def prepared(miniature, prepare_set, tmp_path_factory):
    """Name -> prepared miniature; not to be written to."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp("prepared") / name
        prepare_set(name, miniature(name), folder)
        return folder

    return make
