"""Colour and height on real tiles: from a few iterations of MFNet to maps, on grids that agree and on others."""

from __future__ import annotations

import pytest
import rasterio

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
