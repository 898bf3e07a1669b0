"""Labels and images of downloads, as the prepared sets hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cegate.config import IGNORE
from cegate.data.rasters import read_codes, read_header, read_image
from cegate.errors import DataError

ISPRS_COLOURS = (0x000000, 0xFFFFFF, 0x0000FF, 0x00FFFF, 0x00FF00, 0xFFFF00, 0xFF0000)
"""0xRRGGBB of the stored ids: nothing, impervious surface, building, low vegetation, tree, car, clutter."""
_MMHUNAN_RAW = (*range(13), IGNORE)


@dataclass(frozen=True)
class Label:
    """A label that was read."""

    ids: np.ndarray
    """[H, W] uint8, values as stored in the prepared set."""
    unknown_px: int = 0
    """Pixels whose colour means nothing in this set; they are ignored."""


ReadImage = Callable[[Path], np.ndarray]
"""Path -> [C, H, W], uint8 unless it is in metres."""
ReadLabel = Callable[[Path], Label]


def image_reader(text: str) -> ReadImage | None:
    """Reader of a row: "copy" (none), or bands, as in "4 3 2" or "4 3 2 as bytes"."""
    if text == "copy":
        return None
    bands, _, stretched = text.partition(" as ")
    return partial(read_bands, bands=tuple(map(int, bands.split())), stretch=bool(stretched))


def label_reader(row: Mapping[str, Any], stored: Mapping[int, str], options: Mapping[str, str | int]) -> ReadLabel:
    """Reader of a row's labels.

    Args:
        row: of the table of published sets.
        stored: value in the prepared labels -> class name or "ignore".
        options: what the set is prepared with.
    """
    match row["label"]:
        case "isprs":
            ids = row["unified"][options["low_vegetation"]] if "unified" in row else range(7)
            return partial(read_isprs, ids=tuple(ids))
        case "stored":
            return partial(read_table, values={value: value for value in stored})
        case "table":
            values = dict(enumerate(map(int, row["raw"].split())))
            codes = (int(colour, 16) for colour in row["raw_colours"].split())
            return partial(read_table, values=values, colours=dict(zip(codes, values.values(), strict=True)))
        case "mmhunan":
            return partial(read_mmhunan, known=row["label_maps"][options["label_map"]])
    return read_bright


def read_bands(path: Path, bands: Sequence[int], stretch: bool = False) -> np.ndarray:
    """Bands of an image; stretched, each fills 0..255."""
    image = read_image(path, bands=bands)
    return to_bytes(image) if stretch else image


def read_isprs(path: Path, ids: Sequence[int] = tuple(range(7))) -> Label:
    """Ids of a label in the colours of ISPRS; colours that are none of them (some files hold a few) become 0.

    Args:
        path: the label.
        ids: id of each of `ISPRS_COLOURS`.
    """
    codes = read_codes(path, colours=True)
    stored, known = np.zeros(codes.shape, np.uint8), np.zeros(codes.shape, bool)
    for code, number in zip(ISPRS_COLOURS, ids, strict=True):
        here = codes == code
        known |= here
        stored[here] = number
    return Label(stored, int(known.size - known.sum()))


def read_bright(path: Path) -> Label:
    """1 where the first band is bright: 128 or more in 8 bit (unless the file holds 0 and 1 alone), else above 0."""
    values = read_image(path, bands=[1])[0]
    bright = 128 if values.dtype == np.uint8 and values.max() > 1 else 1
    return Label((values >= bright).astype(np.uint8))


def read_table(path: Path, values: Mapping[int, int], colours: Mapping[int, int] | None = None) -> Label:
    """A label that is released as ids or in colours: a file of one band holds ids, unless it is a palette file (or one
    of three bands) of known colours."""
    if colours and read_header(path).bands >= 3:
        codes = read_codes(path, colours=True)
        if np.isin(codes, list(colours)).all() or (codes % 0x010101).any():  # not grey
            return Label(recode(path, codes, colours, colours=True))
    return Label(recode(path, read_codes(path, colours=False), values))


def read_mmhunan(path: Path, known: Mapping[int, int]) -> Label:
    """Train ids of raw labels, 255 where they are ignored."""
    values = read_codes(path, colours=False)
    table = dict.fromkeys(_MMHUNAN_RAW, IGNORE) | dict(known)
    if np.issubdtype(values.dtype, np.signedinteger):
        table |= {-1: IGNORE}  # what 255 is in eight signed bits
    return Label(recode(path, values, table))


def recode(path: str | Path, codes: np.ndarray, table: Mapping[int, int], *, colours: bool = False) -> np.ndarray:
    """Replace label codes.

    Args:
        path: the file, for messages.
        codes: [H, W] values, or 0xRRGGBB.
        table: code -> value to store.
        colours: the codes are colours.

    Returns:
        [H, W] uint8.

    Raises:
        DataError: a code that is not in the table; the file, the codes and their pixel counts are named.
    """
    known = sorted(table)
    if codes.dtype == np.uint8:  # most labels: one look-up
        new = np.array([table.get(code, -1) for code in range(256)])[codes]
        bad = new < 0
    else:
        place = np.clip(np.searchsorted(known, codes), 0, len(known) - 1)
        new = np.array([table[code] for code in known])[place]
        bad = np.array(known)[place] != codes
    if bad.any():
        raise DataError(unknown_codes(path, codes[bad], known, colours=colours))
    return new.astype(np.uint8)


def unknown_codes(path: str | Path, found: np.ndarray, known: Sequence[int], *, colours: bool = False) -> str:
    """One line on values that a label should not hold."""
    values, counts = np.unique(found, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    spelled = [f"{_spell(values[k], colours)} ({counts[k]} px)" for k in order[:6]]
    more = f" and {len(order) - 6} more" if len(order) > 6 else ""
    kind = "colours" if colours else "values"
    return (
        f"{path}: {kind} out of range: {', '.join(spelled)}{more}; "
        f"labels of this set hold {', '.join(_spell(code, colours) for code in known)}"
    )


def _spell(code: float, colours: bool) -> str:
    return f"#{int(code):06X}" if colours else f"{code:g}"


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Stretch every band from its lowest to its highest value over 0..255, rounding down as a cast does.

    Args:
        image: [C, H, W] of any real dtype; what is not finite becomes 0, as does a band of one value.

    Returns:
        [C, H, W] uint8.
    """
    image = image.astype(np.float64)
    finite = np.isfinite(image)
    low = np.where(finite, image, np.inf).min(axis=(1, 2), keepdims=True)
    high = np.where(finite, image, -np.inf).max(axis=(1, 2), keepdims=True)
    span = np.where(high > low, high - low, 1)
    return np.where(finite & (high > low), (np.where(finite, image, 0) - low) / span * 255, 0).astype(np.uint8)
