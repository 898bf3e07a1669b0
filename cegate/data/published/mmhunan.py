"""MMHunan: Sentinel-2 with elevation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cegate.config import IGNORE
from cegate.data.prepared import Counts
from cegate.data.published.base import RGB, Label, Options, Piece, Plan, Published, Setting, pair, recode, to_bytes
from cegate.data.published.downloads import Member, find
from cegate.data.rasters import read_codes, read_image

CLASSES = ("cropland", "forest", "grassland", "wetland", "water", "unused_land", "built_up_area")
PALETTE = ("#C45A11", "#338158", "#B1CD3D", "#E45460", "#5B9AD6", "#E1AE6E", "#EF9F02")
LABEL_MAPS = {
    "dataset": {1: 0, 2: 1, 3: 2, 4: 1, 5: 3, 6: 4, 7: 6, 8: 6, 9: 5, 10: 6},
    "mfnet": {1: 0, 2: 1, 3: 2, 5: 3, 6: 4, 8: 5, 9: 6},
}
"""Raw label -> train id as the authors of the set and as MFNet have it (whose 8 and 9 are probably exchanged); the
other raw labels are ignored."""
TEST = (
    *(
        11767,
        11816,
        1239,
        12626,
        12815,
        1290,
        1303,
        13254,
        13257,
        13515,
        13765,
        14108,
        14293,
        15426,
        1625,
        16373,
        16750,
    ),
    *(16890, 17039, 17055, 17107, 17455, 17821, 17980, 18958, 1908, 1923, 20028, 2106, 21385, 21423, 22312, 2256, 2265),
    *(2442, 2603, 27264, 28965, 29287, 30275, 3280, 4017, 4166, 4886, 5215, 5233, 5410, 639, 7176, 11624),
)
"""Numbers of the test images; all others train."""
_RAW = (*range(13), IGNORE)
_COUNTS = {"train": Counts(450, 450), "test": Counts(50, 50)}


def read_true_colour(path: Path) -> np.ndarray:
    """Red, green and blue of a Sentinel-2 image, each stretched to 0..255."""
    return to_bytes(read_image(path, bands=(4, 3, 2)))


def read_elevation(path: Path) -> np.ndarray:
    """The first topographic band, stretched to 0..255."""
    return to_bytes(read_image(path, bands=(1,)))


def read_label(path: Path, label_map: str) -> Label:
    """Train ids of raw labels, 255 where they are ignored."""
    values = read_codes(path, colours=False)
    table = dict.fromkeys(_RAW, IGNORE) | LABEL_MAPS[label_map]
    if np.issubdtype(values.dtype, np.signedinteger):
        table |= {-1: IGNORE}  # what 255 is in eight signed bits
    return Label(recode(path, values, table))


def plan_mmhunan(members: Sequence[Member], options: Options) -> Plan:
    """Images as true colour, elevation beside them in dsm_dir."""
    images = find(members, r"s2/(?:s2_)?(\d+)\.tif")
    elevation = find(members, r"topo/(?:topo_)?(\d+)\.tif")
    labels = find(members, r"lc/(?:lc_)?(\d+)\.tif")
    keys, missing = pair(images, labels)
    missing += tuple(f"topo/topo_{key[0]}.tif" for key in keys if key not in elevation)
    missing += tuple(f"test/s2/s2_{number}.tif" for number in TEST if (str(number),) not in images)
    pieces = [
        Piece(
            split="test" if int(key[0]) in TEST else "train",
            name=key[0],
            image=images[key],
            label=labels[key],
            read_label=partial(read_label, label_map=str(options["label_map"])),
            read_image=read_true_colour,
            extras=(("dsm_dir", elevation[key], read_elevation),) if key in elevation else (),
        )
        for key in keys
    ]
    return Plan(pieces, _COUNTS, dict.fromkeys(_COUNTS, RGB), missing)


MMHUNAN = Published(
    name="mmhunan",
    title="MMHunan: Sentinel-2 with elevation, 10 m, 7 classes",
    origin="https://github.com/LauraChow/HunanMultimodalDataset",
    licence="the repository names it",
    layout=(
        "{train,val,test}/{s2,topo,lc}/{s2_,topo_,lc_}<n>.tif, 400, 50 and 50 images of 256x256 "
        "(the prefix lc_ may be absent)"
    ),
    classes=CLASSES,
    palette=PALETTE,
    stored=dict(enumerate(CLASSES)) | {IGNORE: "ignore"},
    splits=_COUNTS,
    plan=plan_mmhunan,
    settings={
        "label_map": Setting(
            "dataset", "mmhunan: raw labels as in the data set (the default) or as in mfnet.", tuple(LABEL_MAPS)
        )
    },
)
