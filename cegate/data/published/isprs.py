"""ISPRS 2D semantic labelling: Potsdam (as it is, and in the classes it shares with RescueNet) and Vaihingen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cegate.data.prepared import Counts
from cegate.data.published.base import (
    IRRG,
    RGB,
    Label,
    Options,
    Piece,
    Plan,
    Published,
    Setting,
    crop_setting,
    expected_counts,
    read_rgb,
)
from cegate.data.published.downloads import Member, find
from cegate.data.rasters import read_codes, read_image
from cegate.errors import ConfigError, nearest

CLASSES = ("impervious_surface", "building", "low_vegetation", "tree", "car", "clutter")
PALETTE = ("#FFFFFF", "#0000FF", "#00FFFF", "#00FF00", "#FFFF00", "#FF0000")
UNIFIED_CLASSES = ("impervious_surface", "building", "vegetation", "car", "clutter")
"""What Potsdam and RescueNet have in common."""
UNIFIED_PALETTE = ("#FFFFFF", "#0000FF", "#00FF00", "#FFFF00", "#FF0000")
UNIFIED = {"ignore": (0, 1, 2, 0, 3, 4, 5), "merge": (0, 1, 2, 3, 3, 4, 5)}
"""Stored id of Potsdam -> unified one, by what becomes of low vegetation."""

POTSDAM_TRAIN = (
    *("2_10", "2_11", "2_12", "3_10", "3_11", "3_12", "4_10", "4_11", "4_12", "5_10", "5_11", "5_12"),
    *("6_7", "6_8", "6_9", "6_10", "6_11", "6_12", "7_7", "7_8", "7_9", "7_10", "7_11", "7_12"),
)
POTSDAM_VAL = (
    *("2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15"),
    *("5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13"),
)
VAIHINGEN_TRAIN = ("1", "3", "5", "7", "11", "13", "15", "17", "21", "23", "26", "28", "30", "32", "34", "37")
VAIHINGEN_VAL = ("2", "4", "6", "8", "10", "12", "14", "16", "20", "22", "24", "27", "29", "31", "33", "35", "38")
CROP = 512

_BANDS = {"RGB": RGB, "IRRG": IRRG, "RGBIR": (*RGB, "infrared")}
_OF_RGBIR = {"RGB": (1, 2, 3), "IRRG": (4, 1, 2), "RGBIR": (1, 2, 3, 4)}  # 1-based bands of the RGBIR tiles
_OF_OWN = {"RGB": (1, 2, 3), "IRRG": (1, 2, 3), "RGBIR": (1, 2, 3, 4)}
_REGISTRATION = "ISPRS, after a request by e-mail: https://www.isprs.org/education/benchmarks/UrbanSemLab"
_LICENCE = "for research; ISPRS names the terms with the download"
_CODES = [0, *(int(colour[1:], 16) for colour in PALETTE)]  # 0xRRGGBB of each stored id


def _stored(classes: Sequence[str]) -> dict[int, str]:
    return {0: "ignore"} | {k + 1: name for k, name in enumerate(classes)}


def read_label(path: Path, ids: tuple[int, ...] = tuple(range(7))) -> Label:
    """A colour label as stored ids.

    Args:
        path: the label; colours that are none of the classes' (some files hold a few) become 0.
        ids: replaces the ids of this module, if others are to be stored.
    """
    codes = read_codes(path, colours=True)
    stored, known = np.zeros(codes.shape, np.uint8), np.zeros(codes.shape, bool)
    for code, number in zip(_CODES, ids, strict=True):
        here = codes == code
        known |= here
        stored[here] = number
    return Label(stored, int(known.size - known.sum()))


def _tiles(members: Sequence[Member], *patterns: str) -> dict[str, Member]:
    """Tile -> file, numbers without leading zeros."""
    return {"_".join(str(int(k)) for k in key): member for key, member in find(members, *patterns).items()}


def _gaps(tiles: Iterable[str], files: Mapping[str, Member], pattern: str) -> list[str]:
    return [pattern.format(tile) for tile in tiles if tile not in files]


def plan_potsdam(members: Sequence[Member], options: Options) -> Plan:
    """Crops of each band set; tiles that are not in the training list belong to val."""
    ids = UNIFIED[options["low_vegetation"]] if "low_vegetation" in options else tuple(range(7))
    label_name = r"top_potsdam_(\d+)_(\d+)_label_noBoundary\.tif"
    labels = _tiles(members, rf"5_Labels_all_noBoundary/{label_name}", label_name)
    wanted = str(options["bands"]).split(",")
    if unknown := [name for name in wanted if name not in _BANDS]:
        raise ConfigError(
            f"--bands={options['bands']}: {unknown[0]!r} is none of {', '.join(_BANDS)}{nearest(unknown[0], _BANDS)}; "
            "give one, or several with commas between"
        )
    everything = _tiles(members, r"top_potsdam_(\d+)_(\d+)_RGBIR\.tif")
    every_tile = (*POTSDAM_TRAIN, *POTSDAM_VAL)
    pieces, missing = [], _gaps(every_tile, labels, "top_potsdam_{}_label_noBoundary.tif")
    for name in wanted:
        images = _tiles(members, rf"top_potsdam_(\d+)_(\d+)_{name}\.tif")
        missing += _gaps(every_tile, everything | images, f"top_potsdam_{{}}_{name}.tif")
        for tile in sorted(labels.keys() & (everything | images).keys()):
            member, chosen = (images[tile], _OF_OWN) if tile in images else (everything[tile], _OF_RGBIR)
            pieces.append(
                Piece(
                    split=f"{name}/{'train' if tile in POTSDAM_TRAIN else 'val'}",
                    name=tile,
                    image=member,
                    label=labels[tile],
                    read_label=partial(read_label, ids=ids),
                    read_image=partial(read_image, bands=chosen[name]),
                    crop=options["crop"],
                )
            )
    published = {f"{name}/{part}": counts for name in wanted for part, counts in _POTSDAM_COUNTS.items()}
    bands = {split: _BANDS[split.partition("/")[0]] for split in published}
    return Plan(pieces, expected_counts(published, options, CROP), bands, tuple(missing))


def plan_vaihingen(members: Sequence[Member], options: Options) -> Plan:
    """Crops of the areas in the two lists; area 9 has a label and no image."""
    area = r"top_mosaic_09cm_area(\d+)"
    images = _tiles(members, rf"top/{area}\.tif")  # labels with boundary have the same file names
    labels = _tiles(members, rf"{area}_noBoundary\.tif")
    every_area = (*VAIHINGEN_TRAIN, *VAIHINGEN_VAL)
    missing = _gaps(every_area, images, "top/top_mosaic_09cm_area{}.tif")
    missing += _gaps(every_area, labels, "top_mosaic_09cm_area{}_noBoundary.tif")
    pieces = [
        Piece(
            split="train" if number in VAIHINGEN_TRAIN else "val",
            name=f"area{number}",
            image=images[number],
            label=labels[number],
            read_label=read_label,
            read_image=read_rgb,
            crop=options["crop"],
        )
        for number in every_area
        if number in images and number in labels
    ]
    return Plan(
        pieces,
        expected_counts(_VAIHINGEN_COUNTS, options, CROP),
        dict.fromkeys(_VAIHINGEN_COUNTS, IRRG),
        tuple(missing),
    )


_POTSDAM_COUNTS = {"train": Counts(24, 3456), "val": Counts(14, 2016)}
_POTSDAM_SPLITS = {f"{name}/{part}": counts for name in ("RGB", "IRRG") for part, counts in _POTSDAM_COUNTS.items()}
_VAIHINGEN_COUNTS = {"train": Counts(16, 344), "val": Counts(17, 398)}
_POTSDAM_LAYOUT = (
    "2_Ortho_RGB/top_potsdam_<tile>_RGB.tif, 3_Ortho_IRRG/top_potsdam_<tile>_IRRG.tif (or 4_Ortho_RGBIR/"
    "top_potsdam_<tile>_RGBIR.tif for both) and 5_Labels_all_noBoundary/top_potsdam_<tile>_label_noBoundary.tif, "
    "38 tiles of 6000x6000; folders or the zips of these names"
)
_POTSDAM_SETTINGS = {
    "crop": crop_setting(CROP),
    "bands": Setting("RGB,IRRG", "Band sets of Potsdam to prepare: RGB, IRRG, RGBIR (default RGB,IRRG)."),
}

POTSDAM = Published(
    name="isprs-potsdam",
    title="ISPRS Potsdam: aerial, 5 cm, 6 classes, RGB and IRRG",
    origin=_REGISTRATION,
    licence=_LICENCE,
    layout=_POTSDAM_LAYOUT,
    classes=CLASSES,
    palette=PALETTE,
    stored=_stored(CLASSES),
    splits=_POTSDAM_SPLITS,
    plan=plan_potsdam,
    settings=_POTSDAM_SETTINGS,
)
RESCUE = Published(
    name="potsdam-rescue",
    title="ISPRS Potsdam in the five classes it shares with RescueNet",
    origin=_REGISTRATION,
    licence=_LICENCE,
    layout=_POTSDAM_LAYOUT,
    classes=UNIFIED_CLASSES,
    palette=UNIFIED_PALETTE,
    stored=_stored(UNIFIED_CLASSES),
    splits=_POTSDAM_SPLITS,
    plan=plan_potsdam,
    settings=_POTSDAM_SETTINGS
    | {
        "low_vegetation": Setting(
            "ignore", "potsdam-rescue: ignore low vegetation (default), or merge it into vegetation.", tuple(UNIFIED)
        )
    },
)
VAIHINGEN = Published(
    name="isprs-vaihingen",
    title="ISPRS Vaihingen: aerial, 9 cm, 6 classes, IRRG",
    origin=_REGISTRATION,
    licence=_LICENCE,
    layout=(
        "ISPRS_semantic_labeling_Vaihingen.zip with top/top_mosaic_09cm_area<n>.tif and "
        "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE.zip with "
        "top_mosaic_09cm_area<n>_noBoundary.tif, 33 areas; zips or folders"
    ),
    classes=CLASSES,
    palette=PALETTE,
    stored=_stored(CLASSES),
    splits=_VAIHINGEN_COUNTS,
    plan=plan_vaihingen,
    settings={"crop": crop_setting(CROP)},
)
