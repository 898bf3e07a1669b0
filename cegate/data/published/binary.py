"""Sets of one class and background: WHU buildings, DeepGlobe roads, Massachusetts roads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cegate.data.prepared import Counts
from cegate.data.published.base import RGB, Label, Options, Piece, Plan, Published, pair
from cegate.data.published.downloads import Member, find
from cegate.data.rasters import read_image

PALETTE = ("#000000", "#FFFFFF")


def read_label(path: Path) -> Label:
    """1 where the first band is bright: 128 or more in 8 bit (unless the file holds 0 and 1 alone), else above 0."""
    values = read_image(path, bands=[1])[0]
    bright = 128 if values.dtype == np.uint8 and values.max() > 1 else 1
    return Label((values >= bright).astype(np.uint8))


def _whole(split: str, images: Mapping, labels: Mapping) -> tuple[list[Piece], tuple[str, ...]]:
    """Pieces of pairs whose key is (part, name), in the splits `split` formatted with the part."""
    keys, missing = pair(images, labels)
    return [Piece(split.format(key[0]), key[1], images[key], labels[key], read_label) for key in keys], missing


def plan_whu(members: Sequence[Member], options: Options) -> Plan:
    """Tiles as they are; a path that says satellite, train_all or test_all belongs to satellite data set II."""
    satellite = [m for m in members if re.search(r"satellite|/(?:train|test)_all/", m.path, re.IGNORECASE)]
    aerial = sorted(set(members) - set(satellite), key=lambda member: member.path)
    pieces, missing = [], ()
    for split, part, part_members in (
        ("aerial/{}", r"(train|val|test)", aerial),
        ("satellite/{}", r"(train|test)(?:_all)?", satellite),
    ):
        images = find(part_members, rf"{part}/image/([^/]+)\.tiff?")
        labels = find(part_members, rf"{part}/label/([^/]+)\.tiff?")
        found, gaps = _whole(split, images, labels)
        pieces += found
        missing += gaps
    return Plan(pieces, _WHU_COUNTS, dict.fromkeys(_WHU_COUNTS, RGB), missing)


def plan_deepglobe(members: Sequence[Member], options: Options) -> Plan:
    """The labelled images, all of them for training."""
    images = find(members, r"(train)/([^/]+)_sat\.jpg")
    labels = find(members, r"(train)/([^/]+)_mask\.png")
    pieces, missing = _whole("{}", images, labels)
    return Plan(pieces, _DEEPGLOBE_COUNTS, dict.fromkeys(_DEEPGLOBE_COUNTS, RGB), missing)


def plan_massachusetts(members: Sequence[Member], options: Options) -> Plan:
    """Images as they are, in the published splits."""
    images = find(members, r"(train|val|test)/([^/]+)\.tiff?")
    labels = find(members, r"(train|val|test)_labels/([^/]+)\.tiff?")
    pieces, missing = _whole("{}", images, labels)
    return Plan(pieces, _MASSACHUSETTS_COUNTS, dict.fromkeys(_MASSACHUSETTS_COUNTS, RGB), missing)


_WHU_COUNTS = {
    "aerial/train": Counts(4736, 4736),
    "aerial/val": Counts(1036, 1036),
    "aerial/test": Counts(2416, 2416),
    "satellite/train": Counts(13662, 13662),
    "satellite/test": Counts(3726, 3726),
}
_DEEPGLOBE_COUNTS = {"train": Counts(6226, 6226)}
_MASSACHUSETTS_COUNTS = {"train": Counts(1108, 1108), "val": Counts(14, 14), "test": Counts(49, 49)}

WHU = Published(
    name="whu",
    title="WHU buildings: aerial (New Zealand, 0.3 m) and satellite II (East Asia, 0.45 m)",
    origin="http://gpcv.whu.edu.cn/data/building_dataset.html",
    licence="the page names it",
    layout=(
        "aerial: {train,val,test}/{image,label}/<n>.tif, 4736, 1036 and 2416 tiles of 512x512; satellite data set II: "
        "{train_all,test_all}/{image,label}/<n>.tif, or {train,test} below a folder with 'satellite' in its name, "
        "13662 and 3726 tiles"
    ),
    classes=("background", "building"),
    palette=PALETTE,
    stored={0: "background", 1: "building"},
    splits=_WHU_COUNTS,
    plan=plan_whu,
)
DEEPGLOBE = Published(
    name="deepglobe",
    title="DeepGlobe roads: satellite, 0.5 m",
    origin="the DeepGlobe 2018 road extraction challenge, after registration: http://deepglobe.org",
    licence="the challenge names it",
    layout="train/<n>_sat.jpg and train/<n>_mask.png, 6226 images of 1024x1024 (valid and test have no masks)",
    classes=("background", "road"),
    palette=PALETTE,
    stored={0: "background", 1: "road"},
    splits=_DEEPGLOBE_COUNTS,
    plan=plan_deepglobe,
)
MASSACHUSETTS = Published(
    name="massachusetts",
    title="Massachusetts roads: aerial, 1 m",
    origin="https://www.cs.toronto.edu/~vmnih/data",
    licence="the page names it",
    layout=(
        "tiff/{train,val,test}/<name>.tiff and tiff/{train,val,test}_labels/<name>.tif, "
        "1108, 14 and 49 images of 1500x1500"
    ),
    classes=("background", "road"),
    palette=PALETTE,
    stored={0: "background", 1: "road"},
    splits=_MASSACHUSETTS_COUNTS,
    plan=plan_massachusetts,
)
