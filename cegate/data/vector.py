"""Masks from drawn shapes: features of a GeoPackage, GeoJSON or shapefile, burned to the grid of an image when asked.

A pixel belongs to a feature that its centre lies in; lines and points take the pixels they touch first. Where features
overlap, the later in the file counts. Where there is none the pixel is class 0, unless the map of labels has a meaning
for ``''``; features without a value are as if they were not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform_bounds, transform_geom

from cegate.config import IGNORE
from cegate.data.rasters import Header, Window
from cegate.errors import ConfigError, DataError, nearest

EVERY = "1"
"""Value of every feature where no attribute is named."""
_SHOWN = 6
_BEGINNINGS = {".gpkg": b"SQLite format 3\0", ".shp": b"\x00\x00\x27\x0a"}  # GDAL tells formats by content


class ShapeLabels:
    """What features mean.

    Args:
        attribute: the field that holds the class; None: every feature is the same, class 1 or what the map says of 1.
        mapping: value of the attribute -> class name, class index or "ignore", and ``''`` for what lies outside; None:
            values are class names or class indices.
        classes: class names in the order of their indices.

    Raises:
        ConfigError: the map means nothing.
    """

    def __init__(self, attribute: str | None, mapping: Mapping[str, str | int] | None, classes: Sequence[str]) -> None:
        self.attribute = attribute
        by_name = {name: index for index, name in enumerate(classes)}
        by_name |= {str(index): index for index in range(len(classes))} | {"ignore": IGNORE}
        if wrong := [meaning for meaning in (mapping or {}).values() if str(meaning) not in by_name]:
            raise ConfigError(f"label_map: {wrong[0]!r} is no class{nearest(str(wrong[0]), by_name)}")
        table = by_name if mapping is None else {str(key): by_name[str(value)] for key, value in mapping.items()}
        self.outside = table.pop("", 0)
        self.table = table

    @property
    def codes(self) -> tuple[tuple[str, int], ...]:
        """What makes two maps equal."""
        return (("attribute", self.attribute), ("", self.outside), *self.table.items())

    def burn(self, path: Path, image: Header, window: Window | None = None) -> np.ndarray:
        """[H, W] uint8 class indices, 255 where ignored, of an image or of a part of it.

        Raises:
            DataError: the file cannot be read, has no such attribute or values outside the map; the image does not
                know where it lies; what reads shapes is not installed.
        """
        pyogrio, shapely = _readers()
        fields, system = _about(path)
        if self.attribute is not None and self.attribute not in fields:
            hint = nearest(self.attribute, fields) or f"; it has {', '.join(fields) or 'none'}"
            raise DataError(f"{path} has no attribute {self.attribute!r}{hint}")
        if image.place is None:
            raise DataError(f"an image of {path} has no georeference, so shapes cannot be laid over it; give masks")
        matrix, image_system = image.place
        height, width = image.size if window is None else (window.height, window.width)
        to_map = Affine(*matrix[:2].ravel())
        if window is not None:
            to_map @= Affine.translation(window.left, window.top)
        differ = bool(system and image_system) and system != image_system
        box = _box(to_map, height, width)
        try:
            if differ:
                box = transform_bounds(image_system, system, *box)
            columns = [] if self.attribute is None else [self.attribute]
            _, ids, shapes, values = pyogrio.raw.read(path, columns=columns, bbox=box, return_fids=True, force_2d=True)
            order = np.argsort(ids, kind="stable")  # an index answers in an order of its own
            found = shapely.from_wkb(shapes[order])
            texts = [EVERY] * len(order) if self.attribute is None else [_text(value) for value in values[0][order]]
            drawn = [
                (shape, text) for shape, text in zip(found, texts, strict=True) if shape is not None and text != ""
            ]
            geometries = [shape.__geo_interface__ for shape, _ in drawn]
            if differ and geometries:
                geometries = transform_geom(system, image_system, geometries)
        except (RasterioError, CRSError, pyogrio.errors.DataSourceError, shapely.errors.ShapelyError) as error:
            raise DataError(f"{path}: cannot be read as shapes ({' '.join(str(error).split())})") from error
        self._refuse_unknown(path, [text for _, text in drawn])
        label = np.full((height, width), self.outside, np.uint8)
        if geometries:
            burned = ((shape, self.table[text]) for shape, (_, text) in zip(geometries, drawn, strict=True))
            rasterize(burned, out=label, transform=to_map)
        return label

    def _refuse_unknown(self, path: Path, texts: Sequence[str]) -> None:
        if unknown := Counter(text for text in texts if text not in self.table):
            shown = ", ".join(f"{text!r} ({count} features)" for text, count in unknown.most_common(_SHOWN))
            known = ", ".join(self.table)
            raise DataError(
                f"{path}: values of {self.attribute!r} outside the label map: {shown}; known are {known}; add them to "
                "label_map, as a class or as 'ignore'"
            )


def attributes_of(path: Path) -> dict[str, list[str]]:
    """Attribute -> its values, each once, as label_map spells them.

    Raises:
        DataError: the file cannot be read, or what reads it is not installed.
    """
    pyogrio, _ = _readers()
    _about(path)
    meta, _, _, columns = pyogrio.raw.read(path, read_geometry=False)
    return {
        name: sorted({_text(value) for value in values} - {""})
        for name, values in zip(meta["fields"].tolist(), columns, strict=True)
    }


def _readers() -> tuple[ModuleType, ModuleType]:
    try:
        import pyogrio
        import pyogrio.errors
        import pyogrio.raw
        import shapely
    except ImportError as error:
        raise DataError(f"masks in vector files need {error.name}: pip install cegate[vector]") from error
    return pyogrio, shapely


def _about(path: Path) -> tuple[tuple[str, ...], CRS | None]:
    """Names of the attributes, and the coordinate system."""
    try:
        return _about_version(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


@lru_cache(maxsize=1024)
def _about_version(path: Path, _: int) -> tuple[tuple[str, ...], CRS | None]:
    pyogrio, _shapely = _readers()
    with path.open("rb") as file:
        head = file.read(64)
    wanted = _BEGINNINGS.get(path.suffix.lower(), b"{")
    if not head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(wanted) and not head.startswith(wanted):
        raise DataError(f"{path} is no {path.suffix.lower()[1:]} by its content; write it anew, e.g. with ogr2ogr")
    try:
        info = pyogrio.read_info(path)
        return tuple(map(str, info["fields"])), info["crs"] and CRS.from_user_input(info["crs"])
    except (pyogrio.errors.DataSourceError, CRSError) as error:
        raise DataError(f"{path}: cannot be read as shapes ({' '.join(str(error).split())})") from error


def _box(to_map: Affine, height: int, width: int) -> tuple[float, float, float, float]:
    corners = [to_map @ corner for corner in ((0, 0), (width, 0), (0, height), (width, height))]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _text(value: Any) -> str:
    """A value as label_map spells it; nothing for none."""
    if value is None or value != value:
        return ""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()
