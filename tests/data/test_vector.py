"""Masks burned from shapes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform_geom

from cegate.config import SetConfig
from cegate.data.datasets import open_set
from cegate.data.rasters import Window
from cegate.errors import ConfigError, DataError

CLASSES = ["ground", "house", "water"]


def square(left, top, right, bottom):
    """Of pixels of the image below."""
    x0, x1, y0, y1 = 1000 + left, 1000 + right, 5000 - bottom, 5000 - top
    return {"type": "Polygon", "coordinates": [[(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]]}


def write_shapes(path, shapes, system="EPSG:32632"):
    """(shape, class) -> GeoJSON in a coordinate system of choice."""
    features = [
        {
            "type": "Feature",
            "properties": {"kind": kind, "code": k},
            "geometry": transform_geom("EPSG:32632", system, shape, precision=12),
        }
        for k, (shape, kind) in enumerate(shapes)
    ]
    named = {"type": "name", "properties": {"name": system.replace("EPSG:", "urn:ogc:def:crs:EPSG::")}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": named, "features": features}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    place = {"crs": "EPSG:32632", "transform": from_origin(1000, 5000, 1, 1)}
    with rasterio.open(
        tmp_path / "images/a.tif", "w", driver="GTiff", height=20, width=30, count=3, dtype="uint8", **place
    ) as dst:
        dst.write(np.ones((3, 20, 30), np.uint8))
    return tmp_path


SHAPES = [(square(2, 3, 12, 9), "house"), (square(8, 5, 20, 15), "water"), (square(0, 18, 4, 20), None)]
EXPECTED = np.zeros((20, 30), np.uint8)
EXPECTED[3:9, 2:12] = 1
EXPECTED[5:15, 8:20] = 2  # the later of two


def open_folder(folder, **changes):
    cfg = {"root": str(folder), "images": "images/*.tif", "masks": "labels/*.geojson", "attribute": "kind", **changes}
    return open_set(SetConfig(**cfg), name="source", classes=CLASSES)


@pytest.mark.parametrize("system", ["EPSG:32632", "EPSG:4326"])
def test_shapes_are_burned_in_the_grid_of_their_image(folder, system):
    pytest.importorskip("pyogrio")
    write_shapes(folder / "labels/a.geojson", SHAPES, system)
    opened = open_folder(folder)
    opened.check(training=True)
    assert np.array_equal(opened.read(0).label, EXPECTED)
    window = Window(4, 5, 9, 11)
    assert np.array_equal(opened.read(0, window).label, EXPECTED[window.slices])
    assert opened._burn(0, window).tolist() == EXPECTED[window.slices].tolist()  # as of a file too large to hold
    assert opened.shares["water"] == pytest.approx((EXPECTED == 2).mean())


def test_values_map_like_those_of_masks(folder):
    pytest.importorskip("pyogrio")
    write_shapes(folder / "labels/a.geojson", SHAPES)
    renamed = open_folder(folder, label_map={"house": "ignore", "water": 1, "": "ground"})
    assert np.array_equal(renamed.read(0).label, np.choose(EXPECTED, [0, 255, 1]))
    numbers = open_folder(folder, attribute="code", label_map={"0": "house", "1": "water", "2": "water", "": "ignore"})
    assert np.unique(numbers.read(0).label).tolist() == [1, 2, 255]
    assert np.array_equal(open_folder(folder, attribute=None).read(0).label > 0, (EXPECTED > 0) | _corner())
    assert renamed.fingerprint() != numbers.fingerprint()


def _corner():
    corner = np.zeros((20, 30), bool)
    corner[18:20, 0:4] = True
    return corner


def test_one_file_serves_all_images(folder):
    pytest.importorskip("pyogrio")
    write_shapes(folder / "all.geojson", SHAPES)
    assert np.array_equal(open_folder(folder, masks="all.geojson").read(0).label, EXPECTED)


def test_what_cannot_be_burned_is_told(folder):
    pytest.importorskip("pyogrio")
    write_shapes(folder / "labels/a.geojson", SHAPES)
    with pytest.raises(DataError, match="has no attribute 'kid'; did you mean 'kind'"):
        open_folder(folder, attribute="kid").read(0)
    with pytest.raises(DataError, match=r"outside the label map: 'water' \(1 features\); known are house"):
        open_folder(folder, label_map={"house": "house"}).read(0)
    with pytest.raises(ConfigError, match="label_map: 'hous' is no class; did you mean 'house'"):
        open_folder(folder, label_map={"house": "hous"})
    (folder / "labels/a.geojson").write_bytes(b"<OGRVRTDataSource/>")
    with pytest.raises(DataError, match="is no geojson by its content"):
        open_folder(folder, attribute="other").read(0)


def test_without_its_library_one_line_says_what_to_install(folder, monkeypatch):
    write_shapes(folder / "labels/a.geojson", SHAPES)
    monkeypatch.setitem(sys.modules, "pyogrio", None)
    with pytest.raises(DataError, match=r"need pyogrio: pip install cegate\[vector\]"):
        open_folder(folder).read(0)
