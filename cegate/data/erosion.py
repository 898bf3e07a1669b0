"""Labels without the pixels at class boundaries, as the ISPRS benchmark evaluates them."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from cegate.config import IGNORE

ISPRS_RADIUS_PX = 3
"""Radius of the disc by which the labels "no boundary" of Potsdam and Vaihingen are eroded."""


def erode_labels(labels: np.ndarray, radius_px: int = ISPRS_RADIUS_PX, *, ignore: int = IGNORE) -> np.ndarray:
    """Ignore every pixel within a distance of one of another class.

    Args:
        labels: [H, W] of an integer type; at least 8 bits unsigned.
        radius_px: distance in pixels, >= 0; the disc holds what is not farther away, its rim included.
        ignore: value of pixels that do not count. They are no class: nothing is eroded beside them.

    Returns:
        [H, W], a copy of the labels' type.
    """
    reach = np.arange(-radius_px, radius_px + 1)
    disc = np.hypot(reach[:, None], reach) <= radius_px
    known, wide = labels != ignore, labels.astype(np.int32)
    # beyond the edge the nearest pixel counts again, which lies in the disc too
    highest = maximum_filter(np.where(known, wide, np.iinfo(np.int32).min), footprint=disc, mode="nearest")
    lowest = minimum_filter(np.where(known, wide, np.iinfo(np.int32).max), footprint=disc, mode="nearest")
    return np.where(known & (highest == lowest), labels, ignore).astype(labels.dtype)
