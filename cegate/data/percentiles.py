"""The range of each band where nobody gave one: percentiles of a sample of a set's pixels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cegate.data.rasters import Header, open_image
from cegate.data.scale import is_measured
from cegate.errors import DataError

log = logging.getLogger(__name__)

_RANGE_FILES, _RANGE_PX = 32, 2**16  # the subsample that percentiles are taken of
_FEW = 256  # pixels that tell whether a band has more than a few values


def percentiles(
    files: Sequence[Path], header_of: Callable[[int], Header], bands: Sequence[int], name: str
) -> tuple[tuple[float, float], ...]:
    """1st and 99th percentile of each band, of evenly spread pixels of evenly spread files.

    Pixels of the value that a file's tag calls nodata do not count, unless the band has no others.

    Args:
        files: the images.
        header_of: what the file of an index says about itself; asked for those that are read.
        bands: 1-based.
        name: of the set, for the log.

    Raises:
        DataError: no pixel is finite.
    """
    chosen = np.unique(np.linspace(0, len(files) - 1, _RANGE_FILES).round().astype(int))
    samples, kept = [], []
    for index in chosen:
        header = header_of(index)
        height, width = header.size
        with open_image(files[index]) as image:
            pixels = image.every_nth(-(-height * width // _RANGE_PX), bands)
        pixels = pixels[:, np.isfinite(pixels).all(0)]
        samples.append(pixels.astype(np.float64))
        differ = (_differs(row, header.nodata[band - 1]) for row, band in zip(pixels, bands, strict=True))
        kept.append(np.stack(list(differ)) & is_measured(pixels))
    values, counts = np.concatenate(samples, axis=1), np.concatenate(kept, axis=1)
    if not values.size:
        raise DataError(f"{files[0]}: no finite pixel in bands {list(bands)}; set value_range")
    rows = [row[mask] if mask.any() else row for row, mask in zip(values, counts, strict=True)]
    ends = tuple(tuple(np.percentile(row, (1, 99)).tolist()) for row in rows)
    _look_at_ends(rows, ends, bands, name)
    return ends


def _look_at_ends(
    rows: Sequence[np.ndarray], ends: Sequence[tuple[float, float]], bands: Sequence[int], name: str
) -> None:
    """Say where an end of a band's range is a value that stands apart, as what means no data without a tag does."""
    apart = {}
    for band, row, low_high in zip(bands, rows, ends, strict=True):
        for end in filter(functools.partial(_stands_apart, row), low_high):
            apart[band] = row, end
    if not apart:
        return
    row, end = next(iter(apart.values()))
    log.warning(
        "set %r: %.1f %% of the pixels are %g, far from all others (band%s %s); if that stands for no data, tag it "
        "(gdal_edit.py -a_nodata %g), or set value_range",
        *(name, 100 * (row == end).mean(), end, "s" * (len(apart) > 1), ", ".join(map(str, apart)), end),
    )


def _stands_apart(values: np.ndarray, end: float) -> bool:
    """Whether a value lies farther from all others than these lie from each other, and they are more than a few."""
    others = values[values != end]
    if not 0 < others.size < values.size:
        return False
    low, high = others.min(), others.max()
    few = np.unique(others[:: max(1, others.size // _FEW)]).size < _FEW // 8
    return bool(max(low - end, end - high) > high - low) and not few


def _differs(values: np.ndarray, tag: float | None) -> np.ndarray:
    """Where values are not the nodata tag, compared in their own dtype: GDAL prints a float32 with too many digits."""
    with np.errstate(over="ignore"):
        return np.ones(values.shape, bool) if tag is None else values != tag
