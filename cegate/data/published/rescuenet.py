"""RescueNet, in the five classes it shares with Potsdam."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cegate.data.prepared import Counts
from cegate.data.published.base import RGB, Label, Options, Piece, Plan, Published, pair, read_values_or_colours
from cegate.data.published.downloads import Member, find
from cegate.data.published.isprs import UNIFIED_CLASSES, UNIFIED_PALETTE

RAW_COLOURS = (
    *(0x000000, 0x3DE6FA, 0xB47878, 0xEBFF07, 0xFFB806, 0xFF0000, 0xFF00F5, 0x8C8C8C, 0xA09614, 0x04FA07, 0xFFEB00),
)
"""0xRRGGBB of the raw ids: background, water, buildings of no, minor, major and total damage, vehicle, clear and
blocked road, tree, pool."""
UNIFIED = dict(enumerate((5, 5, 2, 2, 2, 2, 4, 1, 1, 3, 5)))
"""Raw id -> stored id: water and pool join the background, which becomes clutter."""
_COLOURS = {colour: UNIFIED[raw] for raw, colour in enumerate(RAW_COLOURS)}
_COUNTS = {"train": Counts(3595, 3595), "val": Counts(449, 449), "test": Counts(450, 450)}


def read_label(path: Path) -> Label:
    """Unified ids of raw ids or release colours."""
    return read_values_or_colours(path, UNIFIED, _COLOURS)


def plan_rescuenet(members: Sequence[Member], options: Options) -> Plan:
    """Images as they are, labels recoded."""
    images = find(members, r"(train|val|test)-org-img/([^/]+)\.jpg")
    labels = find(members, r"(train|val|test)-label-img/([^/]+)_lab\.png")
    keys, missing = pair(images, labels)
    pieces = [Piece(*key, images[key], labels[key], read_label) for key in keys]
    return Plan(pieces, _COUNTS, dict.fromkeys(_COUNTS, RGB), missing)


RESCUENET = Published(
    name="rescuenet",
    title="RescueNet: drone, after a hurricane, in the five classes it shares with Potsdam",
    origin="https://github.com/BinaLab/RescueNet-A-High-Resolution-Post-Disaster-UAV-Dataset-for-Semantic-Segmentation",
    licence="the repository names it",
    layout=(
        "{train,val,test}/<split>-org-img/<n>.jpg and {train,val,test}/<split>-label-img/<n>_lab.png, "
        "3595, 449 and 450 images of 4000x3000"
    ),
    classes=UNIFIED_CLASSES,
    palette=UNIFIED_PALETTE,
    stored={0: "ignore"} | {k + 1: name for k, name in enumerate(UNIFIED_CLASSES)},
    splits=_COUNTS,
    plan=plan_rescuenet,
)
