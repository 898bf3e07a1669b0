"""The main job, end to end, on a few real tiles with a real pretrained ViT."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import cegate
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


def test_potsdam_with_heights_trains_and_is_measured_elsewhere(shared, tmp_path):
    """Image and height through one frozen encoder; source and target are rows of the city that share no ground."""
    root = str(shared / "data" / "irrg_ndsm_potsdam_vaihingen_sweden" / "potsdam")
    classes = ["impervious_surface", "building", "low_vegetation", "tree", "car", "clutter"]

    def rows(pattern: str) -> dict:
        return {
            "root": root,
            "images": f"image/potsdam_{pattern}_img.png",
            "masks": f"label/potsdam_{pattern}_gt.png",
            "second": {"images": f"dsm/potsdam_{pattern}_dsm.png"},
            "label_map": {"0": "ignore"} | {str(k + 1): name for k, name in enumerate(classes)},
        }

    config = read_config(
        {
            "run": {"work_dir": str(tmp_path / "potsdam"), "method": "mfnet_gate"},
            "data": {
                "classes": classes,
                "source": rows("[89]??_*"),
                "targets": {"north": rows("1??_*") | {"limit": 1}},
                "crop": 64,
                "batch_size": 2,
                "workers": 0,
            },
            "modal": {"fusion": "sum"},
            "gate": {"k": 4, "interval": 4, "samples": 2},
            "train": {"iterations": 8, "lr": 1e-3, "eval_every": 8, "log_every": 1},
        },
        training=True,
    )
    result = train(config)
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses)
    assert [line["domain"] for line in lines if line["split"] == "after"] == ["north"]
    scores = json.loads((result.path / "gates.jsonl").read_text().splitlines()[0])["scores"]
    assert any(site.endswith(".dsm") for site in scores) and all(math.isfinite(score) for score in scores.values())
