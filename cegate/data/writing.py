"""Writes masks and images: PNG and TIFF, a mask with the place of the raster that it is of."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from cegate.config import IGNORE
from cegate.cores import usable_cores
from cegate.data.door import open_raster
from cegate.data.encoders import PngWriter, Tag, TiffWriter, Writer, read_tags
from cegate.errors import DataError

log = logging.getLogger(__name__)

MASK_SUFFIXES = (".png", ".tif", ".tiff")
"""Files that a mask can be written as."""
_GEO_KEYS = 34735
"""GeoTIFF's field of what the coordinate system is; GDAL leaves it out where it would need an .aux.xml beside."""


def write_mask(
    path: str | Path, mask: np.ndarray, *, like: str | Path | None = None, palette: Sequence[str] | None = None
) -> None:
    """Write class indices as a single-band PNG or (compressed) TIFF; see `open_mask`.

    Args:
        path: target; its suffix decides the format: .png, .tif or .tiff.
        mask: [H, W] uint8.
        like, palette: see `open_mask`.

    Raises:
        DataError: another suffix, dtype or shape, or a size that differs from that of `like`.
        OSError: the file cannot be written, as on a full disk.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise DataError(f"{path}: a mask is [H, W] uint8, not {list(mask.shape)} {mask.dtype}")
    with open_mask(path, mask.shape, like=like, palette=palette) as writer:
        writer.write(mask)


@contextmanager
def open_mask(
    path: str | Path,
    size: tuple[int, int],
    *,
    like: str | Path | None = None,
    palette: Sequence[str] | None = None,
) -> Iterator[Writer]:
    """Write a mask from top to bottom; a tile's height of it is held.

    Args:
        path: target; its suffix decides the format: .png, .tif or .tiff.
        size: (H, W).
        like: a raster of that size whose coordinate system and transform, or ground control points, a TIFF takes over;
            a PNG has no place for them. A system that GeoTIFF has no keys for is told in the log.
        palette: "#RRGGBB" per class, stored as colour table; 255, which a TIFF calls nodata, is black.

    Yields:
        What takes the rows, all of them before the block ends.

    Raises:
        DataError: another suffix, or a size that differs from that of `like`.
        OSError: the file cannot be written, as on a full disk.
    """
    path = Path(path)
    if path.suffix.lower() not in MASK_SUFFIXES:
        raise DataError(
            f"{path}: a mask cannot be written as {path.suffix or 'a file without suffix'}; use .png or .tif"
        )
    place = {}
    if like is not None:
        with open_raster(like) as src:
            if src.shape != tuple(size):
                given = f"{size[1]}x{size[0]}"
                raise DataError(f"{path}: the mask is {given}, but {like} is {src.width}x{src.height} pixels")
            place = _georeference(src)
    colours = None if palette is None else {k: _triple(c) for k, c in enumerate(palette)} | {IGNORE: (0, 0, 0)}
    with ExitStack() as stack:
        file = stack.enter_context(path.open("wb"))
        if path.suffix.lower() == ".png":
            table = colours and b"".join(bytes(colours.get(value, (0, 0, 0))) for value in range(256))
            writer = PngWriter(file, size, table)
        else:
            threads = stack.enter_context(ThreadPoolExecutor(usable_cores(), "deflate"))
            tags = _tiff_tags(place, colours)
            if place.get("crs") is not None and _GEO_KEYS not in tags:
                log.warning(
                    "%s: GeoTIFF has no keys for its coordinate system, so its mask says none; give it one with "
                    "gdal_edit.py -a_srs, or warp the image to one with an EPSG code first",
                    like,
                )
            writer = TiffWriter(file, size, tags, threads.map)
        yield writer
        writer.close()


def _tiff_tags(place: Mapping[str, Any], colours: Mapping[int, tuple[int, ...]] | None) -> dict[int, Tag]:
    """The fields of a mask's TIFF that say what it is and where it lies, as GDAL writes them."""
    profile = {"driver": "GTiff", "height": 1, "width": 1, "count": 1, "dtype": "uint8", "nodata": IGNORE}
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(**profile, compress="deflate", endianness="little", bigtiff="no", **place) as dst:
            if colours is not None:
                dst.write_colormap(1, colours)
        return read_tags(bytes(memory.getbuffer()))


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an image as PNG or (compressed) TIFF, byte for byte the same for the same pixels.

    Args:
        path: target; its suffix decides the format: .png or .tif.
        image: [C, H, W]; a PNG takes uint8 with 1 to 4 bands.

    Raises:
        DataError: another suffix, dtype, shape or number of bands.
        OSError: the file cannot be written, as on a full disk.
    """
    path = Path(path)
    is_tiff = path.suffix.lower() == ".tif" and image.ndim == 3
    if not is_tiff and (
        path.suffix.lower() != ".png" or image.dtype != np.uint8 or image.ndim != 3 or not 1 <= len(image) <= 4
    ):
        raise DataError(f"{path}: a PNG takes [1..4, H, W] uint8, not {list(image.shape)} {image.dtype}")
    count, height, width = image.shape
    profile = {"driver": "GTiff", "compress": "deflate", "bigtiff": "if_safer"} if is_tiff else {"driver": "PNG"}
    # encoded in memory: GDAL says nothing when a disk is full, Python raises OSError
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(**profile, height=height, width=width, count=count, dtype=str(image.dtype)) as dst:
            dst.write(image)
        path.write_bytes(memory.getbuffer())


def _triple(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def is_georeferenced(path: str | Path) -> bool:
    """Whether a raster knows where it lies: a coordinate system, a transform or ground control points.

    Raises:
        DataError: the file is missing or unreadable.
    """
    with open_raster(path) as src:
        return bool(_georeference(src))


def _georeference(src: rasterio.DatasetReader) -> dict[str, Any]:
    """What a copy of a file's place is written with; empty where it has none."""
    if src.crs is not None or not src.transform.is_identity:
        return {"crs": src.crs, "transform": src.transform}
    points, system = src.gcps
    return {"crs": system, "gcps": points} if points else {}
