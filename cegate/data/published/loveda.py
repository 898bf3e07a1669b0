"""LoveDA, cut for the domain adaptation protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cegate.data.datasets import LOVEDA_CLASSES, LOVEDA_LAYOUT, LOVEDA_ORIGIN, LOVEDA_PALETTE
from cegate.data.prepared import Counts
from cegate.data.published.base import (
    RGB,
    Label,
    Options,
    Piece,
    Plan,
    Published,
    crop_setting,
    expected_counts,
    pair,
    read_rgb,
    recode,
)
from cegate.data.published.downloads import Member, find
from cegate.data.rasters import read_codes

CROP = 512
_COUNTS = {
    "Train/Urban": Counts(1156, 4624),
    "Train/Rural": Counts(1366, 5464),
    "Val/Urban": Counts(677, 2708),
    "Val/Rural": Counts(992, 3968),
}
_IDS = {value: value for value in range(len(LOVEDA_CLASSES) + 1)}


def read_label(path: Path) -> Label:
    """The ids as they are: 0 no data, then the classes."""
    return Label(recode(path, read_codes(path, colours=False), _IDS))


def plan_loveda(members: Sequence[Member], options: Options) -> Plan:
    """Crops of every labelled image; urban and rural stay apart."""
    place = r"(Train|Val)/(Urban|Rural)"
    images = find(members, rf"{place}/images_png/(\d+)\.png")
    labels = find(members, rf"{place}/masks_png/(\d+)\.png")
    keys, missing = pair(images, labels)
    pieces = [
        Piece(f"{part}/{area}", number, images[key], labels[key], read_label, read_rgb, options["crop"])
        for key in keys
        for part, area, number in [key]
    ]
    return Plan(pieces, expected_counts(_COUNTS, options, CROP), dict.fromkeys(_COUNTS, RGB), missing)


LOVEDA = Published(
    name="loveda",
    title="LoveDA: aerial, 0.3 m, 7 classes, urban and rural, cut to 512 px",
    origin=LOVEDA_ORIGIN,
    licence="CC BY-NC-SA 4.0",
    layout=LOVEDA_LAYOUT,
    classes=LOVEDA_CLASSES,
    palette=LOVEDA_PALETTE,
    stored={0: "ignore"} | {k + 1: name for k, name in enumerate(LOVEDA_CLASSES)},
    splits=_COUNTS,
    plan=plan_loveda,
    settings={"crop": crop_setting(CROP)},
)
