"""Miniatures of the published sets: tiny generated scenes in exactly the layout of a download, quirks included."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

from cegate.data.climates import BACKGROUND, BUILDING, CLIMATES, FOREST, ROAD, WATER
from cegate.data.generator import render_scene
from cegate.data.published.casid import DOMAINS
from cegate.data.published.catalogue import CATALOGUE
from cegate.data.published.labels import ISPRS_COLOURS
from cegate.errors import ConfigError, DataError, nearest

CROPS = {"isprs-potsdam": 48, "potsdam-rescue": 48, "isprs-vaihingen": 32, "loveda": 32, "casid": 16}
"""The crop that suits a miniature of a set that is cut."""
CLIMATE_SCENES = "climates"
TOWN = "town"
NO_DOWNLOADS = (CLIMATE_SCENES, TOWN)
"""What is trained on as it is generated."""
_DRIVERS = {".png": "PNG", ".jpg": "JPEG", ".tif": "GTiff", ".tiff": "GTiff"}
_HEIGHT_M = np.array([0, 7, 12, 0, -1], np.float32)  # above ground, by class of a scene
_CLASSES = 5  # of a scene


def generate(name: str, out: Path, seed: int = 0) -> int:
    """Write the miniature of a set.

    Args:
        name: a set of the catalogue, ``climates`` (images and masks of every climate of the scene generator), or
            ``town`` (georeferenced tiles of a labelled town, and a scene of a valley elsewhere).
        out: new or empty folder.
        seed: other scenes.

    Returns:
        Number of files.

    Raises:
        ConfigError: no set has that name.
        DataError: the folder holds something.
    """
    if name not in MINIATURES:
        raise ConfigError(f"no miniature of {name!r}; use one of {', '.join(MINIATURES)}{nearest(name, MINIATURES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out} is not empty; give a new folder")
    writer = _Writer(out, seed)
    MINIATURES[name](writer)
    return writer.files


class _Writer:
    """Draws scenes and writes files."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed, self.files, self._drawn = out, seed, 0, 0

    def scene(self, climate: str, height: int, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The next scene: image [3, H, W] uint8 and label [H, W], an index into the classes of scenes."""
        width = width or height
        number = self.seed * 10_000 + self._drawn
        self._drawn += 1
        image, label = render_scene(climate, number, max(height, width))
        return image[:, :height, :width], label[:height, :width]

    def write(self, path: str, array: np.ndarray, **place: Any) -> None:
        """Write [C, H, W] or [H, W]; the suffix decides on the format. `crs` and `transform` are a GeoTIFF's."""
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        array = array[None] if array.ndim == 2 else array
        count, height, width = array.shape
        profile = {"driver": _DRIVERS[target.suffix], "count": count, "height": height, "width": width}
        if profile["driver"] == "GTiff":
            profile["compress"] = "deflate"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(target, "w", dtype=array.dtype, **profile, **place) as dst:
                dst.write(array)
        self.files += 1

    def write_text(self, path: str, text: str) -> None:
        (self.out / path).write_text(text)
        self.files += 1


def _colours(ids: np.ndarray, palette: Sequence[int]) -> np.ndarray:
    """[3, H, W] of ids [H, W] and 0xRRGGBB colours."""
    table = np.array([[code >> 16, code >> 8 & 255, code & 255] for code in palette], np.uint8)
    return table[ids].transpose(2, 0, 1)


def _codes(palette: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(colour[1:], 16) for colour in palette)


def _infrared(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[H, W] uint8: plants shine, water is dark."""
    gain = np.array([1.7, 0.9, 2.2, 0.8, 0.3], np.float32)[label]
    return np.clip(image.mean(0) * gain, 0, 255).astype(np.uint8)


def _elevation(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[H, W] float32 metres: a gentle slope with things on it."""
    rows, columns = np.indices(label.shape, np.float32)
    return (35 + 0.05 * rows - 0.03 * columns + _HEIGHT_M[label] + image[1] / 255).astype(np.float32)


def _bytes(field: np.ndarray) -> np.ndarray:
    low, high = field.min(), field.max()
    return ((field - low) / max(high - low, 1e-6) * 255).astype(np.uint8)


# --- ISPRS ----------------------------------------------------------------------------------------------------------


def _isprs_ids(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Stored ids 1-6: fields are low vegetation, water is clutter, and a car stands wherever a road is brightest."""
    ids = np.zeros(_CLASSES, np.uint8)
    ids[[BACKGROUND, BUILDING, FOREST, ROAD, WATER]] = 3, 2, 4, 1, 6
    ids = ids[label]
    road = np.where(label == ROAD, image.sum(0, dtype=int), -1)
    for place in np.argsort(road, axis=None)[-4:]:
        row, column = np.unravel_index(place, road.shape)
        ids[row : row + 2, column : column + 3] = 5
    return ids


def _eroded(ids: np.ndarray) -> np.ndarray:
    """0 along the boundaries."""
    edge = np.zeros(ids.shape, bool)
    edge[1:] |= ids[1:] != ids[:-1]
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    return np.where(edge, np.uint8(0), ids)


def _isprs_colours(ids: np.ndarray) -> np.ndarray:
    return _colours(ids, ISPRS_COLOURS)


def _potsdam(writer: _Writer) -> None:
    train, val = (tiles.split() for tiles in CATALOGUE["isprs-potsdam"].row["tiles"].values())
    for tile in (*train, *val):
        image, label = writer.scene("temperate", 72)
        ids, infrared, height = _isprs_ids(image, label), _infrared(image, label), _elevation(image, label)
        row, _, column = tile.partition("_")
        writer.write(f"2_Ortho_RGB/top_potsdam_{tile}_RGB.tif", image)
        writer.write(f"3_Ortho_IRRG/top_potsdam_{tile}_IRRG.tif", np.stack((infrared, image[0], image[1])))
        writer.write(f"4_Ortho_RGBIR/top_potsdam_{tile}_RGBIR.tif", np.concatenate((image, infrared[None])))
        writer.write(f"1_DSM/dsm_potsdam_{int(row):02d}_{column}.tif", height)  # the row has a leading zero here
        jpeg = f"1_DSM_normalisation/dsm_potsdam_{int(row):02d}_{column}_normalized_lastools.jpg"
        writer.write(jpeg, _bytes(height))
        whole, eroded = _isprs_colours(ids), _isprs_colours(_eroded(ids))
        if tile == "4_12":  # some published labels hold a few other colours
            eroded[:, 3, 4:9] = np.array([[254], [252], [1]], np.uint8)
        labels = {"5_Labels_all": (whole, "label"), "5_Labels_all_noBoundary": (eroded, "label_noBoundary")}
        if tile in train:
            labels["5_Labels_for_participants"] = labels["5_Labels_all"]
            labels["5_Labels_for_participants_no_Boundary"] = labels["5_Labels_all_noBoundary"]
        for folder, (colours, kind) in labels.items():
            writer.write(f"{folder}/top_potsdam_{tile}_{kind}.tif", colours)


def _vaihingen(writer: _Writer) -> None:
    folder = "ISPRS_semantic_labeling_Vaihingen"
    train, val = (areas.split() for areas in CATALOGUE["isprs-vaihingen"].row["tiles"].values())
    for number in (*train, *val):
        image, label = writer.scene("boreal", 70 + int(number) % 5, 56)
        ids, infrared = _isprs_ids(image, label), _infrared(image, label)
        top = f"top_mosaic_09cm_area{number}"
        writer.write(f"{folder}/top/{top}.tif", np.stack((infrared, image[0], image[1])))
        writer.write(f"{folder}/dsm/dsm_09cm_matching_area{number}.tif", _elevation(image, label))
        if number in train:
            writer.write(f"{folder}/gts_for_participants/{top}.tif", _isprs_colours(ids))
            eroded = f"{folder}/gts_eroded_for_participants/{top}_noBoundary.tif"
            writer.write(eroded, _isprs_colours(_eroded(ids)))
        complete = f"{folder}_ground_truth_eroded_COMPLETE/{top}_noBoundary.tif"
        writer.write(complete, _isprs_colours(_eroded(ids)))
    lonely = np.zeros((70, 56), np.uint8)  # a label without image
    writer.write(f"{folder}_ground_truth_eroded_COMPLETE/top_mosaic_09cm_area9_noBoundary.tif", _isprs_colours(lonely))


# --- the others -----------------------------------------------------------------------------------------------------


def _loveda(writer: _Writer) -> None:
    ids = np.array([1, 2, 6, 3, 4], np.uint8)  # by class of a scene
    splits = (("Train/Rural", 0), ("Train/Urban", 1366), ("Val/Rural", 2522), ("Val/Urban", 3514), ("Test/Urban", 4191))
    for split, first in splits:
        for number in range(first, first + 3):
            image, label = writer.scene("temperate" if split.endswith("Rural") else "arid", 64)
            stored = ids[label]
            stored[:2], stored[-6:, -6:], stored[-6:, :6] = 0, 5, 7  # no data, barren, agricultural
            writer.write(f"{split}/images_png/{number}.png", image)
            if not split.startswith("Test"):
                writer.write(f"{split}/masks_png/{number}.png", stored)


def _rescuenet(writer: _Writer) -> None:
    raw = np.array([0, 2, 9, 7, 1], np.uint8)  # by class of a scene
    raw_colours = [int(colour, 16) for colour in CATALOGUE["rescuenet"].row["raw_colours"].split()]
    for split, first, count in (("train", 10781, 3), ("val", 10778, 2), ("test", 15005, 2)):
        for number in range(first, first + count):
            image, label = writer.scene("tropical", 48, 64)
            stored = raw[label]
            for k, other in enumerate((3, 4, 5, 6, 8, 10)):  # damage, a vehicle, a blocked road, a pool
                stored[4 * k : 4 * k + 4, :4] = other
            writer.write(f"{split}/{split}-org-img/{number}.jpg", image)
            writer.write(f"{split}/{split}-label-img/{number}_lab.png", stored)
            writer.write(f"{split}/{split}-colour-img/{number}_lab.png", _colours(stored, raw_colours))


def _whu(writer: _Writer) -> None:
    domains = {"temperate": ("train", "val", "test"), "monsoon": ("train_all", "test_all")}
    for climate, parts in domains.items():
        for part in parts:
            for number in range(3 if part.startswith("train") else 2):
                image, label = writer.scene(climate, 32)
                writer.write(f"{part}/image/{number}.tif", image)
                building = (label == BUILDING).astype(np.uint8)
                writer.write(f"{part}/label/{number}.tif", building * (1 if climate == "monsoon" else 255))


def _deepglobe(writer: _Writer) -> None:
    for part, numbers in (("train", (104, 2334, 6230, 998002)), ("valid", (5, 88)), ("test", (7,))):
        for number in numbers:
            image, label = writer.scene("tropical", 64)
            writer.write(f"{part}/{number}_sat.jpg", image)
            if part == "train":
                road = np.where(label == ROAD, 255, 0).astype(np.uint8)
                road[0, :3] = 90, 127, 128  # masks are not all black and white
                writer.write(f"{part}/{number}_mask.png", np.stack((road,) * 3))


def _massachusetts(writer: _Writer) -> None:
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        for number in range(count):
            image, label = writer.scene("boreal", 60)
            name = f"1037869{number}_15"
            writer.write(f"tiff/{part}/{name}.tiff", image)
            writer.write(f"tiff/{part}_labels/{name}.tif", np.where(label == ROAD, 255, 0).astype(np.uint8))


def _casid(writer: _Writer) -> None:
    climates = dict(zip(DOMAINS, ("monsoon", "temperate", "tropical", "boreal"), strict=True))
    for domain, climate in climates.items():
        names = [f"{domain.lower()}_{number:03d}" for number in range(4)]
        for name in names:
            image, label = writer.scene(climate, 80)
            writer.write(f"{domain}/image/{name}.png", image)
            if domain == "SubMs":  # the colours of the release
                writer.write(f"{domain}/label/{name}-label.png", _colours(label, _codes(CATALOGUE["casid"].palette)))
            else:
                folder = "label_id" if domain == "TroMs" else "label"
                writer.write(f"{domain}/{folder}/{name}-label.png", label)
        for part, chosen in (("train", names[:3]), ("test", names[3:])):
            writer.write_text(f"{domain}_{part}.txt", "".join(f"{name}.png\n" for name in chosen))


def _mmhunan(writer: _Writer) -> None:
    raw = np.array([1, 8, 2, 7, 6], np.uint8)  # by class of a scene
    listed = CATALOGUE["mmhunan"].row["listed"]["names"].split()
    for part, numbers in (
        ("train", (1, 2, 3, 5)),
        ("val", (9, 10)),
        ("test", listed[:3]),
    ):
        for number in numbers:
            image, label = writer.scene("monsoon", 64)
            infrared = _infrared(image, label)
            bands = (image[2], image[2], image[1], image[0], *(infrared,) * 5, *(image[0],) * 3)
            stored = raw[label]
            for k, other in enumerate((0, 3, 4, 5, 9, 10, 11, 12, 255)):
                stored[4 * k : 4 * k + 4, :4] = other
            elevation = _elevation(image, label)
            writer.write(f"{part}/s2/s2_{number}.tif", np.stack(bands).astype(np.uint16) * 11 + 200)
            writer.write(f"{part}/s1/s1_{number}.tif", np.stack((elevation, -elevation)) / 10 - 12)
            writer.write(f"{part}/topo/topo_{number}.tif", np.stack((elevation, np.gradient(elevation)[0])))
            prefix = "" if part == "val" else "lc_"  # which is not everywhere
            writer.write(f"{part}/lc/{prefix}{number}.tif", stored)


def _climates(writer: _Writer) -> None:
    for climate in CLIMATES:
        for number in range(4):
            image, label = writer.scene(climate, 128)
            writer.write(f"{climate}/images/{number}.png", image)
            writer.write(f"{climate}/masks/{number}.png", label)


def _town(writer: _Writer) -> None:
    """6 x 6 tiles of 128 px with masks, and 512 px of another climate 5 km north, of 1 m, in UTM 32N."""
    west, north, tile = 690_000, 5_330_000, 128
    image, label = writer.scene("temperate", 6 * tile)
    for top, left in itertools.product(range(0, 6 * tile, tile), repeat=2):
        place = {"crs": "EPSG:32632", "transform": from_origin(west + left, north - top, 1, 1)}
        part = (..., slice(top, top + tile), slice(left, left + tile))
        for kind, array in (("images", image), ("masks", label)):
            writer.write(f"labelled/{kind}/{top // tile}_{left // tile}.tif", array[part], **place)
    image, label = writer.scene("boreal", 512)
    for kind, array in (("images", image), ("masks", label)):
        place = {"crs": "EPSG:32632", "transform": from_origin(west, north + 5000, 1, 1)}
        writer.write(f"valley/{kind}/valley.tif", array, **place)


MINIATURES: dict[str, Callable[[_Writer], None]] = {
    **dict.fromkeys(("isprs-potsdam", "isprs-potsdam-dsm", "potsdam-rescue"), _potsdam),
    **dict.fromkeys(("isprs-vaihingen", "isprs-vaihingen-dsm"), _vaihingen),
    "loveda": _loveda,
    "rescuenet": _rescuenet,
    "whu": _whu,
    "deepglobe": _deepglobe,
    "massachusetts": _massachusetts,
    "casid": _casid,
    "mmhunan": _mmhunan,
    CLIMATE_SCENES: _climates,
    TOWN: _town,
}
