"""The main job, end to end, on a few real tiles with a real pretrained ViT."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import rasterio

import cegate
from cegate import predict
from cegate.configfile import read_config
from cegate.data.rasters import open_image, read_image, read_mask
from cegate.engine.trainer import train
from cegate.metrics import Confusion


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    roads = shared / "data" / "roads"
    config = read_config(
        {
            "run": {"work_dir": str(tmp_path_factory.mktemp("runs") / "epfl2shanghai")},
            "data": {
                "classes": ["background", "road"],
                "source": {"root": str(roads / "epfl"), "limit": 4},
                "validation": {"root": str(roads / "eth_cil"), "limit": 1},
                "targets": {"shanghai": {"root": str(roads / "shanghai"), "limit": 1}},
                "crop": 128,
                "batch_size": 2,
                "workers": 0,
            },
            "model": {
                "backbone": "vit_tiny_patch16_224",
                "weights": str(shared / "weights" / "vit_tiny_patch16_224_in1k.pth"),
            },
            "toolbox": {"spatial": {"rank": 8}, "semantic": {"width": 8}, "frequency": {"width": 8}},
            "gate": {"k": 9, "interval": 6, "samples": 2},
            "train": {"iterations": 12, "lr": 1e-3, "eval_every": 12, "log_every": 1},
        },
        training=True,
    )
    return config, train(config), roads


def test_training_on_real_tiles_lowers_the_loss_and_measures_the_unseen_domain(run):
    _, result, _ = run
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    measured = {line["domain"]: line["mIoU"] for line in lines if line["split"] == "after"}
    assert measured.keys() == {"source", "shanghai"}
    assert all(0 < value < 1 for value in measured.values())


def test_the_gate_chose_k_sites_by_finite_scores(run):
    _, result, _ = run
    rounds = [json.loads(line) for line in (result.path / "gates.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in rounds] == [0, 6]
    for r in rounds:
        assert len(r["active"]) == 9
        assert len(r["scores"]) == 36
        assert all(math.isfinite(score) for score in r["scores"].values())


def test_the_shared_adapter_predicts_what_the_run_measured(run):
    config, result, roads = run
    segmenter = cegate.load(result.path)
    image = sorted((roads / "shanghai" / "images").glob("*"))[0]
    mask = roads / "shanghai" / "masks" / image.name
    confusion = Confusion(segmenter.classes)
    confusion.update(segmenter.predict(image, blend="none"), read_mask(mask, classes=segmenter.classes))
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    recorded = next(r["mIoU"] for r in lines if r["split"] == "after" and r["domain"] == "shanghai")
    assert confusion.scores().mIoU == pytest.approx(recorded, abs=1e-6)
    assert config.gate.k == len(segmenter.toolbox.plan.active)


@pytest.mark.parametrize(
    ("name", "nodata"), [("plain/RGB.byte.tif", 0), ("massachusetts_buildings/22978945_15.tif", 255)]
)
def test_a_border_without_data_is_found_and_white_roofs_are_not_taken_for_one(shared, name, nodata):
    path = shared / "data" / "geotiff" / name
    pixels = read_image(path)
    with open_image(path) as image:
        found = image.without_data()
    np.testing.assert_array_equal(found, (pixels == nodata).all(axis=0))
    assert (found.mean() > 0.3) == (nodata == 0)


# two rasters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_rasters(shared, tmp_path_factory):
    """A run on Potsdam's tiles with heights, split by area."""
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
                "targets": {"west": tiles("*_???") | {"limit": 1}},
                "crop": 64,
                "batch_size": 2,
                "stride": 64,
                "workers": 0,
                "augment": {"resize": [1, 1], "photometric": False},
            },
            "model": {"head": "unetformer"},
            "modal": {"dropout": 0.3},
            "train": {"iterations": 6, "lr": 2e-3, "eval_every": 6, "log_every": 1},
            "evaluate": {"mean_classes": POTSDAM[:5]},
        },
        training=True,
    )
    return train(config).path, shared / "data"


POTSDAM = ["impervious", "building", "low_vegetation", "tree", "car", "clutter"]


def test_colour_and_height_from_tiles_to_a_map(two_rasters, tmp_path):
    run, data = two_rasters
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    (measured,) = [line for line in lines if line["split"] == "after"]
    assert measured["mean_classes"] == POTSDAM[:5] and 0 < measured["mIoU"] < 1
    vaihingen = data / "irrg_ndsm_potsdam_vaihingen_sweden/vaihingen"
    given = ["--input", str(vaihingen / "image/*_16*"), "--second", str(vaihingen / "dsm")]  # <tile>_{img,dsm}.png
    assert predict.main(["--run", str(run), *given, "--output", str(tmp_path), "--stride", "64"]) == 0
    maps = sorted(tmp_path.glob("*.png"))
    assert len(maps) == 2
    with rasterio.open(maps[0]) as written:
        assert written.read(1).max() < 6


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
        assert known.float().mean() > 0.3 and 0 <= heights[known].min() and heights[known].max() <= 1, folder
    image, dsm = odd / "satellite_ortho_dsm/ortho_rgb.tif", odd / "satellite_ortho_dsm/dsm.tif"
    given = ["--input", str(image), "--second", str(dsm), "--output", str(tmp_path / "map.tif")]
    assert predict.main(["--run", str(run), *given]) == 0
    with rasterio.open(tmp_path / "map.tif") as written, rasterio.open(image) as like:
        assert written.transform == like.transform and written.shape == like.shape
