"""Colour and height on real tiles: from a few iterations of MFNet to maps, on grids that agree and on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

import cegate
from cegate import predict
from cegate.configfile import read_config
from cegate.engine.trainer import train

POTSDAM = ["impervious", "building", "low_vegetation", "tree", "car", "clutter"]


@pytest.fixture(scope="module")
def two_rasters(shared, tmp_path_factory):
    """A run on three of Potsdam's tiles with heights, and the folder of real data."""
    root = shared / "data/irrg_ndsm_potsdam_vaihingen_sweden"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    labels = {"0": "ignore", **dict(zip("123456", POTSDAM, strict=True))}

    def tiles(names: str) -> dict:
        return {
            "root": str(root),
            "images": f"potsdam/image/potsdam_{names}_img.png",
            "masks": f"potsdam/label/potsdam_{names}_gt.png",
            "label_map": labels,
            "second": {"images": f"potsdam/dsm/potsdam_{names}_dsm.png"},
        }

    config = read_config(
        {
            "run": {"work_dir": str(tmp_path_factory.mktemp("runs") / "heights"), "method": "mfnet_lora"},
            "data": {
                "classes": POTSDAM,
                "source": tiles("*_????") | {"limit": 3},
                "crop": 64,
                "batch_size": 2,
                "stride": 64,
                "workers": 0,
                "augment": {"resize": [1, 1], "photometric": False},
            },
            "model": {"head": "unetformer"},
            "modal": {"dropout": 0.3},
            "train": {"iterations": 3, "lr": 2e-3, "log_every": 1},
        },
        training=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cegate.engine.trainer.draw_run", lambda *_, **__: None)
        return train(config).path, shared / "data"


def test_tiles_become_maps(two_rasters, tmp_path):
    run, data = two_rasters
    vaihingen = data / "irrg_ndsm_potsdam_vaihingen_sweden/vaihingen"
    given = ["--input", str(vaihingen / "image/*_160?_*"), "--second", str(vaihingen / "dsm")]  # <tile>_{img,dsm}.png
    assert predict.main(["--run", str(run), *given, "--output", str(tmp_path), "--stride", "64"]) == 0
    maps = sorted(tmp_path.glob("*.png"))
    assert [path.stem for path in maps] == ["vaihingen_1600_1469_img", "vaihingen_1604_234_img"]
    with rasterio.open(maps[0]) as written:
        assert written.read(1).max() < len(POTSDAM)


def test_heights_on_other_grids_are_laid_under_the_image(two_rasters, tmp_path):
    run, data = two_rasters
    segmenter, odd = cegate.load(run), data / "coregistered_other_grids"
    if not odd.is_dir():
        pytest.skip(f"no {odd}")
    pairs = {
        "olinda_landsat7_dem": ("L7_ETMs.tif", "olinda_dem_utm25s.tif"),  # one zone, written as two systems
        "rmnp_rgb_dem": ("rmnp-rgb.tif", "rmnp-dem.tif"),  # covers a part of the image
        "satellite_ortho_dsm": ("ortho_rgb.tif", "dsm.tif"),  # numbers of a zone, without a system
    }
    for folder, (image, dsm) in pairs.items():
        image, dsm = odd / folder / image, odd / folder / dsm
        heights = segmenter.normalise(image, second=dsm)[3]
        known = ~heights.isnan()
        assert known.float().mean() > 0.3 and heights[known].min() >= 0 and heights[known].max() <= 1, folder
    image, dsm = odd / "satellite_ortho_dsm/ortho_rgb.tif", odd / "satellite_ortho_dsm/dsm.tif"
    given = ["--input", str(image), "--second", str(dsm), "--output", str(tmp_path / "map.tif")]
    assert predict.main(["--run", str(run), *given]) == 0
    with rasterio.open(tmp_path / "map.tif") as written, rasterio.open(image) as like:
        assert written.transform == like.transform and written.shape == like.shape


COVER = {"1": "water", "2": "trees", "4": "crops", "5": "built", "6": "bare", "7": "snow", "9": "range", "3": "flooded"}
SENTINEL = {
    "elevation": (
        {"root": "s1_s2_dem_lulc_terramind", "images": "S2RGB/*.tif", "masks": "LULC/*.tif", "label_map": COVER},
        {"name": "dem", "images": "DEM/*.tif"},
        list(COVER.values()),
    ),
    "radar": (
        {
            "root": "geotiff/sen1floods11",
            "images": "S2/*_S2*.tif",
            "masks": "Labels/*_Label*.tif",
            "bands": [4, 3, 2],
            "label_map": {"-1": "ignore", "0": "land", "1": "water"},
        },
        {"name": "sar", "images": "S1/*_S1*.tif", "scale": "fixed", "value_range": [-30.0, 5.0]},
        ["land", "water"],
    ),
}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", SENTINEL)
def test_sentinel_with_elevation_or_radar_becomes_a_map(shared, tmp_path, kind):
    source, second, classes = SENTINEL[kind]
    root = shared / "data" / source["root"]
    config = read_config(
        {
            "run": {"work_dir": str(tmp_path / "run"), "method": "mfnet_adapter", "log": ["jsonl"]},
            "data": {
                "classes": classes,
                "source": source | {"root": str(root), "second": second},
                "crop": 64,
                "batch_size": 2,
                "workers": 0,
            },
            "model": {"head": "unetformer"},
            "modal": {"dropout": 0.3},
            "train": {"iterations": 2, "lr": 1e-3, "log_every": 1},
        },
        training=True,
    )
    run = train(config).path
    segmenter = cegate.load(run)
    image = sorted(root.glob(source["images"]))[0]
    raster = next(path for path in root.glob(second["images"]) if path.name[:8] == image.name[:8])
    image, raster = cut(image, tmp_path / "image.tif", 64, 96), cut(raster, tmp_path / "second.tif", 48, 100)
    known = segmenter.normalise(image, second=raster)[3:]
    assert len(known) == {"elevation": 1, "radar": 2}[kind] and known.nan_to_num(0).min() >= 0
    assert known[:, :80, :80].isfinite().float().mean() > 0.9 and known[:, 85:, 85:].isnan().all()  # beyond its edge
    given = ["--run", str(run), "--input", str(image), "--second", str(raster)]
    assert predict.main([*given, "--output", str(tmp_path / "map.tif")]) == 0
    with rasterio.open(tmp_path / "map.tif") as written, rasterio.open(image) as like:
        assert (written.crs, written.transform, written.shape) == (like.crs, like.transform, like.shape)
        both = written.read(1)
    np.testing.assert_array_equal(both, segmenter.predict(image, second=raster))
    assert set(both.ravel()) <= {*range(len(classes)), 255}
    assert (segmenter.predict_proba(image) != segmenter.predict_proba(image, second=raster)).any()
    assert segmenter.predict(second=raster).shape == (100, 100)


def cut(path: Path, out: Path, first: int, side: int) -> Path:
    """A square of a raster, where it lies."""
    area = Window(first, first, side, side)
    with rasterio.open(path) as src:
        place = {"transform": src.window_transform(area), "height": side, "width": side}
        with rasterio.open(out, "w", **src.profile | place) as dst:
            dst.write(src.read(window=area))
    return out
