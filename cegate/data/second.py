"""A second raster of an image (elevation, SAR, infrared) as further channels on the image's grid, NaN where unknown.

A hole is no height: pixels that the file calls nodata, that are NaN or as huge as what stands for no data, and those
beyond its edge are NaN, and so is a whole raster that is missing where it may be. The model's streams put what they
learned for "unknown" there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window as RasterWindow

from cegate.config import SecondConfig
from cegate.data.door import open_raster
from cegate.data.pairs import find_second
from cegate.data.rasters import Header, Window, header_of, misplacement
from cegate.data.scale import is_measured
from cegate.errors import ConfigError, DataError

_SAME_PX = 0.01  # grids that differ by less are one
_BLOCK_PX = 2**20  # read at once while a raster's extremes are looked for
_LOOKED_PX = 50_000_000  # of a set's rasters before a training: those of a small set are all looked at
_EPSILON = 1e-8  # of the published scaling; a flat raster becomes 0
_NO_SYSTEM = CRS.from_epsg(3857)  # stands for an unnamed one, which both rasters share: nothing is projected


@dataclass(frozen=True)
class Fit:
    """How a second raster lies to its image."""

    same_grid: bool
    """Pixel lies on pixel; nothing is warped."""
    shift_px: tuple[float, float] = (0.0, 0.0)
    """Where its upper left corner lies from the image's: right and down, in pixels of the image."""
    text: str = ""
    """What differs."""


def fit_of(image: Header, second: Header) -> Fit:
    """Compare the grids of two files.

    Raises:
        DataError: they cannot be laid over each other; the reason, without the names of the files.
    """
    if image.place is None or second.place is None:
        if image.size != second.size:
            whose = "neither says" if image.place is second.place else "one of them does not say"
            raise DataError(
                f"is {second.width}x{second.height} pixels, the image {image.width}x{image.height}, and {whose} where "
                "it lies; give both a georeference, or the size of the image"
            )
        return Fit(True)
    (to_map, system), (second_to_map, second_system) = image.place, second.place
    if image.size == second.size and misplacement(image, second) < _SAME_PX:
        return Fit(True)
    left, bottom, right, top = _bounds(second)
    if system is not None and second_system is not None and system != second_system:
        try:
            left, bottom, right, top = transform_bounds(second_system, system, left, bottom, right, top)
        except RasterioError as error:
            raise DataError(f"has a coordinate system that does not lead to the image's ({error})") from error
    corners = np.array([(x, y, 1) for x in (left, right) for y in (bottom, top)]).T
    columns, rows, _ = np.linalg.solve(to_map, corners)
    if columns.max() <= 0 or rows.max() <= 0 or columns.min() >= image.width or rows.min() >= image.height:
        raise DataError(
            "does not overlap the image by what both say of their places; give a raster of the same place, or mend the "
            "georeference that is wrong"
        )
    sizes = [math.sqrt(abs(np.linalg.det(matrix[:2, :2]))) for matrix in (to_map, second_to_map)]
    names = [_name(of) for of in (system, second_system)]
    systems = "" if names[0] == names[1] else f"{names[1]}, the image {names[0]}; "
    return Fit(
        False,
        (float(columns.min().round(3)) + 0.0, float(rows.min().round(3)) + 0.0),  # no -0
        f"{systems}pixels of {sizes[1]:.6g}, the image's of {sizes[0]:.6g}",
    )


def _bounds(header: Header) -> tuple[float, float, float, float]:
    corners = np.array([(x, y, 1) for x in (0, header.width) for y in (0, header.height)], float).T
    xs, ys, _ = header.place[0] @ corners
    return xs.min(), ys.min(), xs.max(), ys.max()


def _name(system: CRS | None) -> str:
    return "no coordinate system" if system is None else system.to_string()[:40]


class OpenSecond:
    """A second raster that is held open, on the grid of its image.

    Attributes:
        fit: how it lies to the image.
        bands: 1-based, that are read.
    """

    def __init__(self, path: Path, src: rasterio.DatasetReader, image: Header, bands: Sequence[int]) -> None:
        if max(bands) > src.count:
            has = f"{src.count} band{'s' * (src.count != 1)}"
            raise DataError(
                f"{path} has {has}, of which {list(bands)} are to be read as second raster; give "
                "files that have them, or other second.bands"
            )
        self.path, self.bands, self._image = path, tuple(bands), image
        try:
            self.fit = fit_of(image, header_of(src))
        except DataError as error:
            raise DataError(f"{path} {error}") from error
        self._tags = [src.nodatavals[band - 1] if self.fit.same_grid else None for band in bands]
        self._src = src if self.fit.same_grid else self._warped(src)

    def _warped(self, src: rasterio.DatasetReader) -> WarpedVRT:
        """Bilinear on the image's grid, in float32; NaN where there is nothing."""
        matrix, system = self._image.place
        tag, is_float = src.nodatavals[self.bands[0] - 1], src.dtypes[self.bands[0] - 1].startswith("float")
        return WarpedVRT(
            src,
            src_crs=src.crs or system or _NO_SYSTEM,
            crs=system or src.crs or _NO_SYSTEM,
            transform=rasterio.Affine(*matrix[:2].ravel()),
            height=self._image.height,
            width=self._image.width,
            resampling=Resampling.bilinear,
            src_nodata=math.nan if tag is None and is_float else tag,
            nodata=math.nan,
            dtype="float32",
        )

    def read(self, window: Window | None = None) -> np.ndarray:
        """[C, h, w] float32 in the file's unit, NaN where unknown."""
        area = None if window is None else RasterWindow(window.left, window.top, window.width, window.height)
        stored = self._src.read(list(self.bands), window=area)
        holes = ~is_measured(stored)
        for hole, row, tag in zip(holes, stored, self._tags, strict=True):
            if tag is not None:
                hole |= row == tag
        return np.where(holes, np.nan, stored).astype(np.float32)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self._image.size

    def _blocks(self) -> Iterator[np.ndarray]:
        height, width = self.size
        rows = max(1, _BLOCK_PX // width)
        return (self.read(Window(top, 0, min(rows, height - top), width)) for top in range(0, height, rows))

    def extremes(self) -> np.ndarray | None:
        """[C, 2] smallest and largest value on the image's grid, None where every pixel of a band is unknown."""
        return _extremes(self._blocks())

    def low_high(self, scale: str, value_range: Sequence[float] | None) -> np.ndarray | None:
        """[C, 2] that becomes 0 and 1, see `SecondConfig.scale`; None where nothing is known on the image's grid."""
        if scale == "fixed":
            known = any(not np.isnan(block).all() for block in self._blocks())
            return np.array([value_range] * len(self.bands), float) if known else None
        if scale == "tile":
            return self.extremes()
        with open_raster(self.path) as src:
            return OpenSecond(self.path, src, header_of(src), self.bands).extremes()


@contextmanager
def open_second(path: str | Path, image: Header, bands: Sequence[int] | None = None) -> Iterator[OpenSecond]:
    """Open a second raster on the grid of an image.

    Args:
        path: the file.
        image: the image's header.
        bands: 1-based bands; default: see `usual_bands`.

    Raises:
        DataError: the file is missing or damaged, has too few bands, or cannot be laid over the image.
    """
    with open_raster(path) as src:
        opened = OpenSecond(Path(path), src, image, bands or _usual_bands(src))
        try:
            yield opened
        finally:
            if isinstance(opened._src, WarpedVRT):
                opened._src.close()


def usual_bands(path: str | Path) -> tuple[int, ...]:
    """All bands but alpha; the first alone where a grey picture is stored three times."""
    with open_raster(path) as src:
        return _usual_bands(src)


def refuse_surplus(path: str | Path, bands: Sequence[int], *, whose: str) -> None:
    """
    Raises:
        DataError: a file has bands beside those, where nobody chose.
    """
    found, wanted = len(usual_bands(path)), len(bands)
    if found > wanted:
        raise DataError(
            f"{path} has {found} bands, {whose} {wanted}; give files of {wanted}, or name the bands to read in "
            "second.bands before training"
        )


def _usual_bands(src: rasterio.DatasetReader) -> tuple[int, ...]:
    bands = [band for band, colour in enumerate(src.colorinterp, 1) if colour != ColorInterp.alpha]
    if len(bands) == 3 and src.dtypes[0] == "uint8":
        middle = Window.middle_of(src.shape, 512)
        pixels = src.read(bands, window=RasterWindow(middle.left, middle.top, middle.width, middle.height))
        if (pixels == pixels[:1]).all():
            return (1,)
    return tuple(bands)


def _extremes(blocks: Iterable[np.ndarray]) -> np.ndarray | None:
    """[C, 2] of blocks [C, h, w]; None where a band is NaN throughout."""
    low, high = np.inf, -np.inf
    for block in blocks:
        known = ~np.isnan(block)
        low = np.minimum(low, np.where(known, block, np.inf).min((1, 2)))
        high = np.maximum(high, np.where(known, block, -np.inf).max((1, 2)))
    found = np.stack((low, high), axis=1)
    return found if np.isfinite(found).all() else None


def scaled(values: np.ndarray, low_high: np.ndarray, *, epsilon: float = _EPSILON) -> np.ndarray:
    """(values - low) / (high - low + epsilon), clipped to 0..1; NaN stays.

    Args:
        values: [C, h, w] float32, NaN where unknown; written to.
        low_high: [C, 2].
        epsilon: the published 1e-8 keeps a flat raster at 0.
    """
    low, high = np.asarray(low_high, np.float32).T[:, :, None, None]
    values -= low
    values /= high - low + np.float32(epsilon)
    return np.clip(values, 0, 1, out=values)


def epsilon_of(scale: str) -> float:
    """That of `scaled`: a fixed range needs none."""
    return 0.0 if scale == "fixed" else _EPSILON


def unknown(bands: int, size: tuple[int, int]) -> np.ndarray:
    """[C, H, W] of a raster that is missing."""
    return np.full((bands, *size), np.nan, np.float32)


class SecondRasters:
    """The second rasters of a set, one for each image or one for all.

    Attributes:
        bands: 1-based, that are read of every file.
    """

    def __init__(self, cfg: SecondConfig, root: Path, pattern: str, names: Mapping[str, Path], set_name: str) -> None:
        """Find the files.

        Args:
            cfg: how they are read.
            root: folder of the set.
            pattern: glob below it, with the wildcards of the images; without wildcards it is one file for all.
            names: name of each pair -> image.
            set_name: for messages.
        """
        if (cfg.scale == "fixed") != (cfg.value_range is not None):
            raise ConfigError(
                f"set {set_name!r}: second.scale=fixed and second.value_range go together; give both or none"
            )
        self.cfg, self.name = cfg, set_name
        self.files = find_second(root, pattern, names, set_name, missing=cfg.missing == "allow")
        there = next((file for file in self.files if file is not None), None)
        self.bands = tuple(cfg.bands or ()) or (usual_bands(there) if there is not None else (1,))
        self._ranges: dict[int | Path, np.ndarray | None] = {}

    def check(self, headers: Sequence[Header]) -> str | None:
        """Look at every file's header and at the pixels of a sample, and one line on those that do not lie on their
        image's grid.

        Raises:
            DataError: the first that is damaged, holds nothing, or cannot or may not be laid over its image.
        """
        surplus = self.cfg.surplus or ("ignore" if self.cfg.bands else "error")
        warped: list[tuple[Path, Fit]] = []
        apart = math.ceil(sum(image.height * image.width for image in headers) / _LOOKED_PX)
        for index, (file, image) in enumerate(zip(self.files, headers, strict=True)):
            if file is None:
                continue
            if surplus == "error":
                refuse_surplus(file, self.bands, whose=f"the second raster of set {self.name!r}")
            with open_second(file, image, self.bands) as opened:
                if index % apart == 0:
                    self._low_high(index, opened)
                if opened.fit.same_grid:
                    continue
                warped.append((file, opened.fit))
        if not warped:
            return None
        (file, fit), (right, down) = warped[0], warped[0][1].shift_px
        what = (
            f"set {self.name!r}: {len(warped)} of {len(self.files)} second rasters lie on other grids than their "
            f"images, the first is {file}: {fit.text}, its corner {right:+.2f} px right and {down:+.2f} px down of the "
            "image's"
        )
        if not self.cfg.align:
            raise DataError(f"{what}; set second.align: true to warp them")
        return f"{what}; they are warped to the images (bilinear)"

    def read(self, index: int, image: Header, window: Window | None = None) -> np.ndarray:
        """[C, h, w] float32, 0..1 as `SecondConfig.scale` has it, NaN where unknown.

        Raises:
            DataError: the file is damaged, or knows nothing at all and may not miss.
        """
        file, size = self.files[index], image.size if window is None else (window.height, window.width)
        if file is None:
            return unknown(len(self.bands), size)
        with open_second(file, image, self.bands) as opened:
            if (low_high := self._low_high(index, opened)) is not None:
                return scaled(opened.read(window), low_high, epsilon=epsilon_of(self.cfg.scale))
        return unknown(len(self.bands), size)

    def _low_high(self, index: int, opened: OpenSecond) -> np.ndarray | None:
        key = opened.path if self.cfg.scale == "scene" else index
        if key not in self._ranges:
            self._ranges[key] = opened.low_high(self.cfg.scale, self.cfg.value_range)
        if self._ranges[key] is None and self.cfg.missing == "error":
            raise DataError(
                f"{opened.path}: no pixel of the second raster is known; mend it, or set second.missing: allow to let "
                "the model do without"
            )
        return self._ranges[key]

    def facts(self, facts_of: Callable[[Path], list]) -> list:
        """What a fingerprint holds of the files and of how they are read."""
        cfg = self.cfg
        files = [None if file is None else facts_of(file) for file in self.files]
        return [cfg.scale, cfg.value_range, cfg.align, cfg.missing, self.bands, files]
