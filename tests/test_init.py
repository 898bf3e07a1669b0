"""`cegate init`: from a folder to a configuration that trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from cegate import cli, init, train
from cegate.configfile import read_config
from cegate.data.__main__ import main as data
from cegate.data.rasters import write_image, write_mask
from cegate.engine.sets import open_sets

SIDE = 32


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(path, array, **place):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = array if array.ndim == 3 else array[None]
    if not place and path.suffix == ".png":
        return write_image(path, array)
    count, height, width = array.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": str(array.dtype)}
    with rasterio.open(path, "w", **(profile | place)) as dst:
        dst.write(array)
    return None


def picture(seed, bands=3, dtype=np.uint8, high=255):
    return np.random.default_rng(seed).integers(0, high, (bands, SIDE, SIDE)).astype(dtype)


def mask(seed, values=(0, 1)):
    label = np.random.default_rng(seed).choice(np.array(values), (SIDE, SIDE))
    label.flat[: len(values)] = values
    return label


def started(folder, capsys, *options):
    """What `init` printed, and the configuration as a run reads it, its sets opened and looked at."""
    code = init.main([str(folder), "--out", "mine.yaml", *options])
    out, err = capsys.readouterr()
    assert (code, err) == (cli.GOOD, "")
    config, sets = open_sets(read_config("mine.yaml", training=True))
    return out, config, sets


def trained(**options):
    """Train what `init` wrote, for a moment; what came of it."""
    short = {"train.iterations": 2, "train.eval_every": 2, "gate.samples": 2, "data.workers": 0, "data.batch_size": 2}
    argv = [f"--{key.replace('__', '.')}={value}" for key, value in {**short, **options}.items()]
    assert train.main(["--config", "mine.yaml", *argv]) == cli.GOOD
    result = json.loads(Path("runs/mine/result.json").read_text())
    assert result["iteration"] == 2 and all(scores["mIoU"] is not None for scores in result["after"].values())
    return result["after"]


def test_a_clean_folder_is_described_and_trains(tmp_path, capsys, no_figures):
    for k in range(5):
        put(tmp_path / f"set/images/t{k}.png", picture(k))
        put(tmp_path / f"set/masks/t{k}.png", mask(k, (0, 255)).astype(np.uint8))
    out, config, sets = started(tmp_path / "set", capsys)
    assert "5: images/* with masks/*" in out and "3 bands (red, green, blue), uint8, 32x32 px" in out
    assert "255 is foreground" in out and "1 of 5 images by name (t" in out
    assert "next:    cegate train --config mine.yaml --dry_run" in out
    assert config.data.classes == ["background", "foreground"] and config.data.source.label_map == {"0": 0, "255": 1}
    assert (len(sets.source), len(sets.validation), config.data.crop) == (4, 1, 32)
    assert train.main(["--config", "mine.yaml", "--dry_run"]) == cli.GOOD
    text = capsys.readouterr().out
    assert "held out by name (t" in text and "foreground" in text and "validation (1 images)" in text
    trained()
    out, err = capsys.readouterr()
    assert "next: cegate report --run runs/mine\n      cegate predict --run runs/mine --input IMAGES --output" in out
    top = err.splitlines()[: err.splitlines().index(next(line for line in err.splitlines() if "schedule:" in line)) + 1]
    assert len(top) <= 10 and any(re.match(r"classes: background \d\d\.\d %, fore", line) for line in top)


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    put(tmp_path / "set/images/a.png", picture(0))
    put(tmp_path / "set/masks/a.png", mask(0).astype(np.uint8))
    (tmp_path / "set.yaml").write_text("mine")
    assert init.main(["set"]) == cli.USAGE
    assert "set.yaml exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "set.yaml").read_text() == "mine"
    assert init.main(["set", "--overwrite"]) == cli.GOOD and "one image cannot be divided" in capsys.readouterr().out
    assert init.main(["set", "--out", "no/where.yaml"]) == cli.USAGE
    assert init.main([]) == cli.USAGE and init.main(["nowhere", "--out", "x.yaml"]) == cli.FAILED
    put(tmp_path / "images_only/images/a.png", picture(0))
    assert init.main(["images_only"]) == cli.FAILED
    assert "1 images, but no masks of the same names" in capsys.readouterr().err


def test_train_val_and_test_folders_are_used_as_such(tmp_path, capsys):
    for stage, k in (("train", 0), ("train", 1), ("val", 2), ("test", 3)):
        put(tmp_path / f"set/{stage}/img/{k}.png", picture(k))
        put(tmp_path / f"set/{stage}/label/{k}.png", mask(k, (0, 1, 2)).astype(np.uint8))
    _, config, sets = started(tmp_path / "set", capsys)
    assert config.data.source.val_fraction is None and config.data.source.label_map is None
    assert (len(sets.source), len(sets.validation), [len(t) for t in sets.targets]) == (2, 1, [1])
    assert config.data.classes == ["class_0", "class_1", "class_2"]


def test_an_odd_folder_is_sorted_out_and_trains(tmp_path, capsys, no_figures):
    """One flat folder; deep pixels in four bands; values with gaps, no-data and 255; files to be left out."""
    for k in range(4):
        place = {"crs": "EPSG:32632", "transform": from_origin(SIDE * k - (k == 1), 0, 1, 1)}
        put(tmp_path / f"set/t{k}.tif", picture(k, 4, np.uint16, 3000), **place)
        put(tmp_path / f"set/t{k}_mask.tif", mask(k, (-1, 0, 2, 5, 255)).astype(np.int16), nodata=-1, **place)
    put(tmp_path / "set/t5.tif", picture(5, 4, np.uint16, 3000))
    put(tmp_path / "set/t5_mask.tif", mask(5).astype(np.int16)[:16])
    put(tmp_path / "set/t6.tif", picture(6, 4, np.uint16, 3000))
    out, config, sets = started(tmp_path / "set", capsys)
    out = " ".join(out.split())  # lines are broken where the terminal ends
    assert "t5_mask.tif is not of the size of its image (32x16 for 32x32)" in out
    assert "1 images have no mask, first t6.tif" in out and "1 pairs of images overlap, first t0 and t1" in out
    assert "by place (the " in out and "the first three of 4 bands" in out
    assert config.data.source.label_map == {"0": 0, "2": 1, "5": 2, "-1": "ignore"}
    names = (tmp_path / "mine.txt").read_text().splitlines()
    assert names == ["t0.tif", "t1.tif", "t2.tif", "t3.tif"] and config.data.source.split == str(tmp_path / "mine.txt")
    assert len(sets.source) + len(sets.validation) in (3, 4) and set(np.unique(sets.source.read(0).label)) == {
        0,
        1,
        2,
        255,
    }
    trained()


def test_colours_grey_images_and_near_twins_train(tmp_path, capsys, no_figures):
    colours = np.array([[255, 0, 0], [0, 0, 255], [0, 255, 0]], np.uint8)
    for k in range(3):
        put(tmp_path / f"set/image/{k}.png", picture(k // 2, 1))  # the first two are one
        put(tmp_path / f"set/gt/{k}.png", colours[mask(k, (0, 1, 2))].transpose(2, 0, 1))
    out, config, sets = started(tmp_path / "set", capsys)
    assert "1 pairs of images are nearly the same, first 0 and 1" in out and "each colour is a class" in out
    assert config.data.source.bands == [1, 1, 1] and config.data.palette == ["#0000FF", "#00FF00", "#FF0000"]
    assert np.unique(sets.source.read(0).label).tolist() == [0, 1, 2]
    trained()


def test_masks_that_are_none_are_told(tmp_path, capsys):
    put(tmp_path / "set/images/a.png", picture(0))
    put(tmp_path / "set/masks/a.png", np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE).astype(np.uint8))
    put(tmp_path / "set/images/b.png", picture(1))
    write_mask(tmp_path / "set/masks/b.png", mask(0).astype(np.uint8))
    assert init.main(["set"]) == cli.FAILED and not (tmp_path / "set.yaml").exists()
    assert "as JPEG or smoothing leaves them" in capsys.readouterr().err
    assert data(["check", "set"]) == cli.FAILED


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(("suffix", "profile"), [("jpg", {"driver": "JPEG"}), ("tif", {"compress": "jpeg"})])
def test_masks_of_jpeg_are_told_though_their_values_are_few(tmp_path, capsys, suffix, profile):
    label = np.zeros((SIDE, SIDE), np.uint8)
    label[:, 13:] = 255
    put(tmp_path / "set/images/a.png", picture(0))
    put(path := tmp_path / f"set/masks/a.{suffix}", label[None], **profile)
    with rasterio.open(path) as written:
        assert 2 < len(np.unique(written.read())) < 64
    assert init.main(["set"]) == cli.FAILED and not (tmp_path / "set.yaml").exists()
    assert "as JPEG or smoothing leaves them" in capsys.readouterr().err
    label[:] = 255
    label[:16] = 0  # whole blocks are kept as they are
    put(path, label[None], **profile)
    assert init.main(["set"]) == cli.GOOD
    assert "0 is background, 255 is foreground" in capsys.readouterr().out


def test_shapes(tmp_path, capsys):
    pytest.importorskip("pyogrio")
    ring = [[1002, 4990], [1020, 4990], [1020, 4998], [1002, 4998], [1002, 4990]]
    named = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    features = [
        {
            "type": "Feature",
            "properties": {"id": k, "landclass": name},
            "geometry": {"type": "Polygon", "coordinates": [[[x + 10 * k, y] for x, y in ring]]},
        }
        for k, name in enumerate(["house", "water"])
    ]
    for k in range(2):
        place = {"crs": "EPSG:32632", "transform": from_origin(1000 + SIDE * k, 5000, 1, 1)}
        put(tmp_path / f"set/images/t{k}.tif", picture(k), **place)
    (tmp_path / "set/all.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "crs": named, "features": features})
    )
    out, config, sets = started(tmp_path / "set", capsys, "--overwrite")
    assert "landclass: house, water" in out and config.data.source.attribute == "landclass"
    assert config.data.classes == ["background", "house", "water"]
    assert {*np.unique(sets.source.read(0).label)} <= {0, 1, 2}


def test_links_to_nothing_are_named_and_left_out(tmp_path, capsys):
    for k in range(3):
        put(tmp_path / f"set/images/{k}.png", picture(k))
        put(tmp_path / f"set/masks/{k}.png", mask(k).astype(np.uint8))
    (tmp_path / "set/images/3.png").symlink_to("gone.png")
    put(tmp_path / "set/masks/3.png", mask(3).astype(np.uint8))
    out, _, sets = started(tmp_path / "set", capsys)
    assert "1 links lead nowhere, first images/3.png" in out and "1 masks have no image, first masks/3.png" in out
    assert (tmp_path / "mine.txt").read_text().split() == [f"images/{k}.png" for k in range(3)]
    assert len(sets.source) + len(sets.validation) == 3
    (tmp_path / "all/images").mkdir(parents=True)
    (tmp_path / "all/images/a.png").symlink_to("gone.png")
    assert init.main(["all"]) == cli.FAILED
    assert "no image lies in it; 1 links lead nowhere, first images/a.png; usual are" in capsys.readouterr().err


def test_a_few_images_without_a_system_are_named(tmp_path, capsys):
    for k in range(3):
        where = {"transform": from_origin(SIDE * k, 0, 1, 1)} | ({} if k == 1 else {"crs": "EPSG:32632"})
        put(tmp_path / f"set/images/t{k}.tif", picture(k), **where)
        put(tmp_path / f"set/masks/t{k}.tif", mask(k).astype(np.uint8), **where)
    assert init.main(["set"]) == cli.GOOD
    assert "1 of 3 images have no coordinate system, first t1" in capsys.readouterr().out
    (tmp_path / "set/images/t1.tif").unlink()
    assert init.main(["set", "--overwrite"]) == cli.GOOD and "no coordinate system" not in capsys.readouterr().out


def test_a_guess_is_told_and_pictures_are_no_masks(tmp_path, capsys):
    for k in range(2):
        put(tmp_path / f"set/images/{k}.png", picture(k))
        put(tmp_path / f"set/roads/{k}.png", mask(k).astype(np.uint8))
        put(tmp_path / f"bands/images/{k}.png", picture(k))
        put(tmp_path / f"bands/nir/{k}.png", picture(k, bands=1))
    out, *_ = started(tmp_path / "set", capsys)
    assert "nothing is called after masks; roads/* are taken for them" in " ".join(out.split())
    assert init.main(["bands"]) == cli.FAILED
    assert "4 images, but no masks of the same names" in capsys.readouterr().err


def test_check_lists_what_is_there(tmp_path, capsys):
    for k in range(2):
        put(tmp_path / f"set/images/{k}.png", picture(k))
        put(tmp_path / f"set/masks/{k}.png", mask(k, (0, 1, 1, 1)).astype(np.uint8))
    assert data(["check", "set"]) == cli.GOOD
    out = capsys.readouterr().out
    assert "labels    0 2" in out and "(in all masks)" in out and "next: cegate init set" in out
    assert not (tmp_path / "set.yaml").exists()


REAL = {
    "roads/epfl": ("alpha left out", "0 is background, 1 is foreground"),
    "isprs_sample": ("two sets side by side", "each value is a class"),
    "s1_s2_dem_lulc_terramind": ("several rasters of each place", ""),
    "geotiff/sen1floods11": ("16 bit, negative labels", ""),
    "geotiff/new_brunswick_aerial": ("georeferenced", ""),
    "rgb_nir_deadtree_usa": ("0 and 255, two sets of images", "0 is background, 255 is foreground"),
    "landcover_dubai_india/india": ("pictures of several sizes, two sets of masks", "255 is no label"),
    "irrg_ndsm_potsdam_vaihingen_sweden": ("heights beside, parts without labels", "each value is a class"),
}
"""Folder of real data -> what is odd about it, and what is to be assumed."""


@pytest.mark.parametrize("name", REAL)
def test_real_folders_train_with_what_is_written(name, shared, capsys, monkeypatch, no_figures):
    if not (folder := shared / "data" / name).is_dir():
        pytest.skip(f"no {folder}")
    monkeypatch.setattr("cegate.data.survey.SECONDS", 0.3)
    out, config, sets = started(folder, capsys)
    assert len(sets.source) >= 1 and len(config.data.classes) >= 2 and REAL[name][1] in out
    short = {"data__source__limit": 4, "data__crop": 64, "evaluate__stride": 64, "gate__k": 2}
    assert ("source" in trained(**short)) == (sets.validation is not None)
