"""Reads images and masks, through rasterio: PNG, JPEG, TIFF and GeoTIFF, any number of bands, 8 or 16 bit or float.

Nodata tags are never applied to masks: a set whose background happens to carry the nodata value would lose that class.
Pixels of an image are read as they are stored; `OpenImage.without_data` tells where the file says that there are none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.env import get_gdal_config
from rasterio.errors import RasterioError
from rasterio.warp import transform
from rasterio.windows import Window as RasterWindow

from cegate.config import IGNORE
from cegate.data.door import open_raster
from cegate.data.label_map import LabelMap, unmapped_message
from cegate.data.writing import write_image as write_image
from cegate.data.writing import write_mask as write_mask
from cegate.errors import DataError, bytes_text

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2", ".bmp", ".webp")
"""Files that a bare ``*`` takes for rasters."""
DEFAULT_BANDS = (1, 2, 3)
"""Of an image, where nobody chose others."""
_SAMPLE_PX, _SAMPLE_CACHE = 2**20, 2**26  # pixels read at once, and bytes that GDAL may keep, while sampling a file
_SCAN_CACHE = 1 << 25  # bytes
_BLOCK_ROWS = 1024  # of the files behind a VRT, whose blocks it does not tell
_ALPHA_SIDE = 1024  # of the middle of a file that tells what its alpha band is
# a TIFF of this many bytes of pixels that holds less than one in so many has no tile that was ever written: deflated,
# LZW'd or Zstandard's tiles of one colour take more
_HOLLOW_BYTES, _HOLLOW_RATIO = 1 << 34, 10_000


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def middle_of(cls, size: tuple[int, int], side: int) -> Window:
        """The middle of an image of (H, W) pixels, no larger than a square of that side."""
        height, width = (min(length, side) for length in size)
        return cls((size[0] - height) // 2, (size[1] - width) // 2, height, width)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, for indexing."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Header:
    """What a file says about itself without being decoded."""

    height: int
    width: int
    bands: int
    """Bands as read: a palette image counts as three."""
    dtype: str
    nodata: tuple[float | None, ...] = ()
    """The tag of each band; a palette image has none."""
    place: tuple[np.ndarray, object] | None = None
    """[3, 3] from (column, row, 1) to map coordinates, and their system, where the file says so."""
    names: tuple[str, ...] = ()
    """Of each band: the file's description, else what its colour is; "" where it says neither."""
    pages: int = 1
    """Images in the file, of which the first is read."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width


def _colour_table(src: rasterio.DatasetReader) -> np.ndarray | None:
    """[256, 3] uint8 colours of a palette file, None where there is no palette."""
    if src.count != 1 or src.colorinterp[0] != ColorInterp.palette:
        return None
    table = np.zeros((256, 3), np.uint8)
    for value, colour in src.colormap(1).items():
        if value < 256:
            table[value] = colour[:3]
    return table


def read_header(path: str | Path) -> Header:
    """Size, bands, dtype and nodata tags of a raster.

    Raises:
        DataError: the file is missing or unreadable.
    """
    with open_raster(path) as src:
        return header_of(src)


def header_of(src: rasterio.DatasetReader) -> Header:
    """`read_header` of an open file."""
    pages = max(1, len(src.subdatasets))
    if _colour_table(src) is not None:
        size, colours = (src.height, src.width), ("red", "green", "blue")
        return Header(*size, 3, src.dtypes[0], (None,) * 3, _place(src), colours, pages)
    return Header(src.height, src.width, src.count, src.dtypes[0], src.nodatavals, _place(src), _names(src), pages)


def _names(src: rasterio.DatasetReader) -> tuple[str, ...]:
    mute = (ColorInterp.undefined, ColorInterp.gray)
    colours = ("" if colour in mute else colour.name for colour in src.colorinterp)
    return tuple(told or colour for told, colour in zip(src.descriptions, colours, strict=True))


def _place(src: rasterio.DatasetReader) -> tuple[np.ndarray, object] | None:
    matrix = np.array(src.transform, float).reshape(3, 3)
    return None if src.transform.is_identity or not np.linalg.det(matrix) else (matrix, src.crs)


def refuse_hollow(path: str | Path, header: Header) -> None:
    """A TIFF of a few megabytes may promise terabytes of tiles that were never written: days of work on nothing.

    Raises:
        DataError: it does.
    """
    promised = header.height * header.width * header.bands * np.dtype(header.dtype).itemsize
    if promised < _HOLLOW_BYTES or Path(path).suffix.lower() not in (".tif", ".tiff"):
        return
    if promised > _HOLLOW_RATIO * (held := Path(path).stat().st_size):
        raise DataError(
            f"{path} is {header.width}x{header.height} pixels by its header, {bytes_text(promised)}, but the file "
            f"holds {bytes_text(held)}: nearly all of it was never written; cut out the part that has pixels"
        )


def misplacement(image: Header, mask: Header) -> float:
    """How far a mask lies from its image by what both files say of their places: the farthest corner, in pixels of the
    image; 0 where one of them says nothing, infinite where no way leads from one coordinate system to the other."""
    if image.place is None or mask.place is None:
        return 0.0
    (to_map, system), (mask_to_map, mask_system) = image.place, mask.place
    height, width = image.size
    corners = np.array([(0, 0, 1), (width, 0, 1), (0, height, 1), (width, height, 1)], float).T
    placed = mask_to_map @ corners
    if system != mask_system:
        if system is None or mask_system is None:
            return 0.0
        try:
            placed[:2] = transform(mask_system, system, placed[0], placed[1])
        except RasterioError:
            return math.inf
    moved = np.linalg.solve(to_map, placed)
    return float(np.nan_to_num(np.linalg.norm((moved - corners)[:2], axis=0).max(), nan=math.inf, posinf=math.inf))


class OpenImage:
    """An image file that is held open, so that part after part can be read.

    Attributes:
        header: what the file says about itself.
    """

    def __init__(self, path: str | Path, src: rasterio.DatasetReader) -> None:
        self.header = header_of(src)
        self._path, self._src, self._table = path, src, _colour_table(src)

    def read(self, bands: Sequence[int] | None = None, *, window: Window | None = None) -> np.ndarray:
        """Pixels [C, H, W] in the file's dtype; see `read_image`."""
        count = self.header.bands
        bands = range(1, count + 1) if bands is None else bands
        if max(bands) > count:
            absent = [band for band in bands if band > count]
            raise DataError(
                f"{self._path} has {count} band{'s' * (count != 1)}, band{'s' * (len(absent) > 1)} "
                f"{', '.join(map(str, absent))} {'is' if len(absent) == 1 else 'are'} not there; "
                f"set bands to numbers from 1 to {count}, e.g. [{', '.join(str(min(b, count)) for b in bands)}]"
            )
        self.dtype_of(bands)
        area = _raster_window(window)
        try:
            if self._table is None:
                return self._src.read(list(bands), window=area)
            return self._table[self._src.read(1, window=area)].transpose(2, 0, 1)[[b - 1 for b in bands]]
        except MemoryError as error:
            raise _too_large(self._path, self.header.size) from error

    def every_nth(self, step: int, bands: Sequence[int]) -> np.ndarray:
        """Every step-th pixel of the image's rows, laid end to end, in any order: [C, n] in the file's dtype. Memory
        does not grow with the image."""
        size = self.header.size
        rows, columns = self._src.block_shapes[0]
        if columns < size[1]:
            columns *= max(1, _SAMPLE_PX // (rows * columns))
        else:
            rows *= max(1, _SAMPLE_PX // (rows * columns))
        parts = []
        with rasterio.Env(GDAL_CACHEMAX=_SAMPLE_CACHE):
            for top, left in itertools.product(range(0, size[0], rows), range(0, size[1], columns)):
                window = Window(top, left, min(rows, size[0] - top), min(columns, size[1] - left))
                pixels = self.read(bands, window=window)
                if window.width == size[1]:  # a file may be one strip: no index of its size
                    parts.append(pixels.reshape(len(pixels), -1)[:, -top * size[1] % step :: step].copy())
                    continue
                place = np.arange(top, top + window.height)[:, None] * size[1] + np.arange(left, left + window.width)
                parts.append(pixels[:, place % step == 0])
        return np.concatenate(parts, axis=1)

    def dtype_of(self, bands: Sequence[int]) -> str:
        """What pixels of these bands are stored as.

        Raises:
            DataError: they are not stored alike, as bands of a VRT need not be.
        """
        if self._table is not None:
            return str(self._table.dtype)
        found = {band: self._src.dtypes[band - 1] for band in bands}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{band} is {dtype}" for band, dtype in found.items())
            raise DataError(
                f"{self._path}: bands are stored in different types: {told}; give them one type, e.g. with "
                "gdal_translate -ot Float32, or set bands to those of one"
            )
        return next(iter(found.values()))

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Let GDAL keep as much of the file as reading it from top to bottom needs: a few rows of blocks. By default it
        keeps what it has read, up to a twentieth of the machine's memory."""
        src = self._src
        rows = max(_BLOCK_ROWS, *(rows for rows, _ in src.block_shapes))
        needed = _SCAN_CACHE + 2 * rows * src.width * sum(np.dtype(dtype).itemsize for dtype in src.dtypes)
        with rasterio.Env(GDAL_CACHEMAX=min(needed, get_gdal_config("GDAL_CACHEMAX"))):
            yield

    def without_data(self, *, window: Window | None = None) -> np.ndarray | None:
        """Where the file says that it has no data: every band holds its nodata value, or the pixel is transparent or
        outside the file's mask, as GDAL and its viewers have it.

        An alpha band whose middle holds another value than 0 and one more is data, whatever the file calls it: writers
        call the fourth of four bands so, which may be infrared. So is one that is 0 there, for water may be.

        Returns:
            [H, W] bool, None where the file says nothing of the kind.
        """
        return self._src.dataset_mask(window=_raster_window(window)) == 0 if self._has_mask else None

    @cached_property
    def _has_mask(self) -> bool:
        src = self._src
        meanings = zip(src.colorinterp, src.mask_flag_enums, strict=True)
        flags = [flags for meaning, flags in meanings if meaning != ColorInterp.alpha]
        if not flags or any(MaskFlags.all_valid in of_band for of_band in flags):
            return False
        if not any(MaskFlags.alpha in of_band for of_band in flags):
            return True
        alpha = src.colorinterp.index(ColorInterp.alpha) + 1
        middle = src.read(alpha, window=_raster_window(Window.middle_of(self.header.size, _ALPHA_SIDE)))
        return len(np.unique(middle[middle != 0])) == 1


@contextmanager
def open_image(path: str | Path) -> Iterator[OpenImage]:
    """Open an image to read it part after part: a compressed file is not begun anew for each.

    Raises:
        DataError: the file is missing or unreadable; also inside the block, where a part is.
    """
    with open_raster(path) as src:
        yield OpenImage(path, src)


def read_image(path: str | Path, bands: Sequence[int] | None = None, *, window: Window | None = None) -> np.ndarray:
    """Read the pixels of an image.

    Args:
        path: any raster GDAL reads. A palette image is read as its three colours.
        bands: 1-based bands in the order wanted, repeats allowed; default: all.
        window: read this part only.

    Returns:
        [C, H, W] in the file's dtype.

    Raises:
        DataError: the file is missing, unreadable or has too few bands; the file and both counts are named.
    """
    with open_image(path) as image:
        return image.read(bands, window=window)


def _too_large(path: str | Path, size: tuple[int, int]) -> DataError:
    return DataError(f"{path}: {size[1]}x{size[0]} pixels do not fit into the memory; cut it into tiles")


def _raster_window(window: Window | None) -> RasterWindow | None:
    return None if window is None else RasterWindow(window.left, window.top, window.width, window.height)


def read_mask(
    path: str | Path,
    label_map: LabelMap | Mapping[str | int, str | int] | None = None,
    *,
    classes: Sequence[str] = (),
    ignore: int = IGNORE,
    window: Window | None = None,
) -> np.ndarray:
    """Read a mask as class indices.

    Colours are looked up in RGB(A) files, through the colour table of palette files, and as grey in single-band ones.
    Values are those stored in the file, in a palette file the indices; an RGB file of equal bands counts as grey.

    Args:
        path: the mask.
        label_map: a parsed map, or one that `LabelMap.parse` takes together with `classes` and `ignore`.
        classes: class names in the order of their indices.
        ignore: mask value that is ignored.
        window: read this part only.

    Returns:
        [H, W] uint8: 0..K-1, and 255 where ignored.

    Raises:
        DataError: missing or unreadable file, or values outside the map: the file, the values and their pixel counts.
        ConfigError: the map itself is wrong.
    """
    labels = label_map if isinstance(label_map, LabelMap) else LabelMap.parse(label_map, classes, ignore)
    codes = read_codes(path, colours=labels.colours, window=window)
    label, unmapped = labels.apply(codes)
    if unmapped.any():
        raise DataError(unmapped_message(path, codes[unmapped], labels))
    return label


def read_codes(path: str | Path, *, colours: bool, window: Window | None = None) -> np.ndarray:
    """What a mask holds before any map is applied.

    Args:
        path: the mask.
        colours: read colours, else values; see `read_mask` for what they are in each kind of file.
        window: read this part only.

    Returns:
        [H, W]: 0xRRGGBB int32, or values in the file's dtype.

    Raises:
        DataError: missing or unreadable file, colours of a file that is not 8-bit, values of a file in colours.
    """
    with open_raster(path) as src:
        if len(set(src.dtypes)) > 1:
            raise DataError(f"{path}: bands of a mask are of one type, not {', '.join(src.dtypes)}; write one band")
        try:
            pixels = src.read(window=_raster_window(window))
        except MemoryError as error:
            raise _too_large(path, src.shape) from error
        table, last = _colour_table(src), src.colorinterp[-1]
    alone = len(pixels) == 1 or (len(pixels) == 2 and last == ColorInterp.alpha and not _is_one_hot(pixels))
    if not alone and (len(pixels) not in (3, 4) or (not colours and _is_one_hot(pixels))):
        one_hot = ", one for each class (one-hot)" if _is_one_hot(pixels) else ""
        raise DataError(
            f"{path}: a mask of {len(pixels)} bands{one_hot}; accepted are one band of values or three of colour: "
            "write one band that holds the number of each pixel's class"
        )
    return _colour_codes(path, pixels, table) if colours else _value_codes(path, pixels)


def _is_one_hot(bands: np.ndarray) -> bool:
    """Whether in every pixel one band is on, the others are 0, and the last is not always the one."""
    total = bands.sum(axis=0, dtype=np.float64)
    on = total.flat[0]
    return on > 0 and bool((total == on).all() and ((bands == 0) | (bands == on)).all() and np.ptp(bands[-1]) > 0)


def _colour_codes(path: str | Path, pixels: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """[H, W] int32 0xRRGGBB."""
    if pixels.dtype != np.uint8:
        raise DataError(f"{path}: a mask of {pixels.dtype} has no colours; use values as keys of label_map")
    if table is not None:
        return (table.astype(np.int32) @ (65536, 256, 1)).astype(np.int32)[pixels[0]]
    red, green, blue = pixels[:3] if len(pixels) >= 3 else (pixels[0],) * 3
    return red.astype(np.int32) << 16 | green.astype(np.int32) << 8 | blue


def _value_codes(path: str | Path, pixels: np.ndarray) -> np.ndarray:
    if len(pixels) >= 3 and not ((pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()):
        raise DataError(f"{path}: the mask has {len(pixels)} bands of colour; give a label_map with '#RRGGBB' keys")
    return pixels[0]
