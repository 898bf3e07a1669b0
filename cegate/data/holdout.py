"""Which images are held out of training: a whole place, whole folders, or neighbours by name, as far as known.

Neighbours look alike, so what is drawn at random would flatter. No image of the one part overlaps one of the other, by
their georeferences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds

from cegate.data.rasters import Header
from cegate.draws import generator
from cegate.errors import DataError

_TOUCHING = 1e-3  # of a side: what overlaps less is a neighbour
_COARSE = 2.0  # whole folders may be so many times what was asked for
_COMPASS = ("east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east")


@dataclass(frozen=True)
class Division:
    """The two parts of a set."""

    kept: tuple[int, ...]
    """Indices that are trained on."""
    held: tuple[int, ...]
    """Indices that are held out."""
    how: str
    """In words, as in "by folder (north)"."""


def hold_out(names: Sequence[str], boxes: np.ndarray | None, fraction: float, seed: int = 0) -> Division:
    """Divide the images of a set, as the seed decides.

    With places, what lies farthest in one direction is held out, and images that overlap the border are in neither
    part. Else whole folders, where they come near the fraction. Else a run of neighbours in the order of names.

    Args:
        names: of the images, folders before ``/``, in their order.
        boxes: [n, 4] float64 (west, south, east, north) in one coordinate system; None where places are not known.
        fraction: of the images, 0..1; at least one is held out and one is kept.
        seed: another one divides otherwise.

    Raises:
        DataError: there are fewer than two images, or all overlap each other.
    """
    if len(names) < 2:
        raise DataError("one image cannot be divided; give a validation set of its own, or leave val_fraction out")
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    rng = generator(seed, "hold-out")
    if boxes is not None:
        return _by_place(boxes, count, rng)
    return _by_folder(names, fraction, rng) or _by_name(names, count, rng)


def _by_place(boxes: np.ndarray, count: int, rng: np.random.Generator) -> Division:
    octant = int(rng.integers(len(_COMPASS)))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    for turn in range(len(_COMPASS)):
        angle = (octant + turn) * math.tau / len(_COMPASS)
        far = (centres - centres.mean(0)) @ (math.cos(angle), math.sin(angle))
        held = np.sort(np.argsort(far, kind="stable")[-count:])
        clear = ~overlaps(boxes, boxes[held]).any(1)
        if clear.any():
            kept = np.flatnonzero(clear)
            seam = len(boxes) - len(held) - len(kept)
            more = f"; {seam} more overlap them and are left out" if seam else ""
            where = _COMPASS[(octant + turn) % len(_COMPASS)]
            return Division(tuple(kept.tolist()), tuple(held.tolist()), f"by place (the {where}{more})")
    raise DataError(
        "all images overlap by their georeferences, so no part can be held out; give a validation set of another place"
    )


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n, m] bool: which of n boxes overlap which of m by more than a hair."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    side = (boxes[:, 2:] - boxes[:, :2])[:, None]
    return (high - low > _TOUCHING * side).all(-1)


def _by_folder(names: Sequence[str], fraction: float, rng: np.random.Generator) -> Division | None:
    """Whole folders, drawn until they come as near the fraction as they can; None where they are too coarse."""
    of = [name.rpartition("/")[0] for name in names]
    folders = sorted(set(of))
    if len(folders) < 2:
        return None
    sizes = {folder: of.count(folder) for folder in folders}
    wanted, chosen, total = fraction * len(names), [], 0
    for folder in rng.permutation(folders).tolist():
        if abs(total + sizes[folder] - wanted) < abs(total - wanted) and len(chosen) < len(folders) - 1:
            chosen.append(folder)
            total += sizes[folder]
    if not chosen:  # all are larger than twice the fraction
        chosen = [min(folders, key=sizes.__getitem__)]
        if sizes[chosen[0]] > max(_COARSE * wanted, 1):
            return None
    held = tuple(k for k, folder in enumerate(of) if folder in chosen)
    kept = tuple(k for k, folder in enumerate(of) if folder not in chosen)
    return Division(kept, held, f"by folder ({', '.join(folder or '.' for folder in sorted(chosen))})")


def _by_name(names: Sequence[str], count: int, rng: np.random.Generator) -> Division:
    start = int(rng.integers(len(names) - count + 1))
    held = tuple(range(start, start + count))
    kept = tuple(itertools.chain(range(start), range(start + count, len(names))))
    span = names[start] if count == 1 else f"{names[start]} to {names[start + count - 1]}"
    return Division(kept, held, f"by name ({span})")


def boxes_of(headers: Sequence[Header]) -> np.ndarray | None:
    """Where images lie, [n, 4] (west, south, east, north): in their coordinate system, in degrees where they have
    several; None where one does not say, or where what they say is the same place for most."""
    if any(header.place is None for header in headers):
        return None
    systems = {str(header.place[1]) for header in headers}
    if len(systems) > 1 and "None" in systems:
        return None
    boxes = []
    for header in headers:
        matrix, system = header.place
        height, width = header.size
        corners = (matrix @ np.array([(0, 0, 1), (width, 0, 1), (0, height, 1), (width, height, 1)], float).T)[:2]
        box = (*corners.min(1), *corners.max(1))
        try:
            boxes.append(box if len(systems) == 1 else transform_bounds(system, "EPSG:4326", *box))
        except RasterioError:
            return None
    found = np.array(boxes, np.float64)
    if len(np.unique(found[:, :2].round(9), axis=0)) <= len(found) // 2:  # a transform that says nothing
        return None
    return found
