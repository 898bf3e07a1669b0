"""From pixels as a file stores them to 0..1: which range becomes 0..1, and whether an image is meant for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cegate.errors import DataError

EIGHT_BIT = (0.0, 255.0)
"""The range of a band of 8-bit pixels."""
SCALE_SIDE = 1024
"""Side in pixels of the middle of a file that its scale is told from."""
# reflectances end below 2; what reaches 100 are digital numbers, and nothing that is measured is above a million
_REFLECTANCE, _NUMBER, _NO_DATA = 2.0, 100.0, 1e6
# a float32 holds it, with room for a difference; and what no sensor measures, even a thousandth of it
_HUGE, _NEVER_MEASURED = 1e38, 1e30
# looked at in each band, evenly spread
_SCALE_PX = 1 << 18

ValueRange = Sequence[Sequence[float]]
"""(low, high) of each band, which become 0 and 1."""


def is_eight_bit(value_range: ValueRange) -> bool:
    """Whether a range is that of 8-bit pixels, in every band."""
    return all(tuple(band) == EIGHT_BIT for band in value_range)


def check_depth(dtype: np.dtype | str, value_range: ValueRange, what: str, advice: str) -> None:
    """Refuse 8-bit pixels where others are meant, and the other way round. A range within that of 8 bits which is not
    quite theirs, as percentiles give it, passes with both.

    Args:
        dtype: of the pixels.
        value_range: what they are to be scaled by.
        what: names the pixels in the message.
        advice: what to do about it.

    Raises:
        DataError: pixels are not of the depth the range is for; both are named.
    """
    of_bytes, highest = is_eight_bit(value_range), max(high for _, high in value_range)
    fits_bytes = _REFLECTANCE < highest <= EIGHT_BIT[1]
    if of_bytes != (str(dtype) == "uint8") and (of_bytes or not fits_bytes):
        learned = "8-bit pixels" if of_bytes else f"pixels of up to {highest:g}"
        raise DataError(f"{what}: pixels are {dtype}, but the model learns from {learned}; {advice}")


def has_doubtful_scale(dtype: np.dtype | str, value_range: ValueRange) -> bool:
    """Whether `check_scale` could refuse pixels of a dtype: they are floats, or reflectances are wanted of integers."""
    return str(dtype).startswith("float") or all(high <= _REFLECTANCE for _, high in value_range)


def check_scale(pixels: np.ndarray, value_range: ValueRange, what: str, advice: str) -> None:
    """Refuse reflectances (0..1) where digital numbers (hundreds, thousands) are meant, and the other way round: they
    would all be clipped to one value. What may be either, or is so in some bands only, passes.

    Args:
        pixels: [C, H, W] of any real dtype; NaN and huge values, which stand for no data, do not count.
        value_range: what they are to be scaled by.
        what: names the pixels in the message.
        advice: what to do about it.

    Raises:
        DataError: the scales differ; both are named.
    """
    if not has_doubtful_scale(pixels.dtype, value_range):
        return
    is_float = np.issubdtype(pixels.dtype, np.floating)
    bands = pixels.reshape(len(pixels), -1)
    step = max(1, bands.shape[1] // _SCALE_PX)
    highest = 0.0
    for band, (_, wanted) in zip(bands, value_range, strict=True):
        values = band[::step].astype(np.float64)
        values = values[np.isfinite(values) & (np.abs(values) < _NO_DATA)]
        top, middle = (float(values.max()), float(np.median(values))) if values.size else (0.0, 0.0)
        too_low = is_float and wanted >= _NUMBER and 0 < middle <= top <= _REFLECTANCE
        too_high = wanted <= _REFLECTANCE and middle > (_NUMBER if is_float else _REFLECTANCE)
        if not (too_low or too_high):
            return
        highest = max(highest, top)
    wanted = max(high for _, high in value_range)
    raise DataError(
        f"{what}: pixels of {pixels.dtype} up to {highest:g} do not fit the range the model learned from, up to "
        f"{wanted:g}; {advice}"
    )


def is_measured(values: np.ndarray) -> np.ndarray:
    """Where values are neither NaN nor infinite nor as huge as what stands for no data in float files."""
    if not np.issubdtype(values.dtype, np.floating):
        return np.ones(values.shape, bool)
    return np.isfinite(values) & (np.abs(values) < _NEVER_MEASURED)


def to_unit(image: np.ndarray, value_range: ValueRange) -> tuple[np.ndarray, np.ndarray]:
    """Scale pixels so that each band's range becomes 0..1; what lies outside is clipped.

    Args:
        image: [C, H, W] of any real dtype.
        value_range: (low, high) of each band; a band with low = high becomes 0.

    Returns:
        [C, H, W] float32, and [H, W] bool: where a band is NaN or infinite. Such a pixel is 0 in every band.
    """
    low, high = np.clip(np.array(value_range, np.float64), -_HUGE, _HUGE).astype(np.float32).T.reshape(2, -1, 1, 1)
    scale = np.divide(1, high - low, out=np.zeros_like(high), where=high > low)
    if str(image.dtype) in ("float32", "float64"):  # before the cast: nodata of -1.8e308 would become infinite
        unit = np.clip(image, -_HUGE, _HUGE).astype(np.float32)
    else:
        unit = image.astype(np.float32)
    with np.errstate(over="ignore"):  # of huge values that stand for no data; they are clipped
        unit -= low
        unit *= scale
    np.clip(unit, 0, 1, out=unit)
    empty = np.zeros(image.shape[1:], bool)
    if np.issubdtype(image.dtype, np.floating):
        empty = ~np.isfinite(image).all(0)
        unit[:, empty] = 0
    return unit, empty
