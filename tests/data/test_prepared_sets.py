"""Prepared folders as sets of a configuration."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from cegate.config import SecondConfig, SetConfig
from cegate.configfile import read_config
from cegate.data.datasets import open_set
from cegate.data.prepared import FILE, read_manifest, write_manifest
from cegate.data.published.catalogue import CATALOGUE
from cegate.data.rasters import read_codes, read_image
from cegate.engine.sets import open_sets
from cegate.errors import ConfigError, DataError


def config(root, split, **keys):
    return SetConfig(kind="prepared", root=str(root), split=split, **keys)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_split_of_every_set_opens_and_reads(prepared, name):
    folder, published = prepared(name), CATALOGUE[name]
    seen = set()
    for split, part in read_manifest(folder).splits.items():
        data = open_set(config(folder, split), name="source")
        data.check()
        assert len(data) == part.found.files
        assert data.classes == published.classes and data.palette == published.palette
        for index in range(0, len(data), 9):
            item = data.read(index)
            assert item.image.shape == (3, *item.label.shape)
            assert 0 <= item.image.min() < item.image.max() <= 1
            seen |= set(np.unique(item.label).tolist())
    assert seen <= {*range(len(published.classes)), 255}
    assert len(seen - {255}) > 1


@pytest.mark.parametrize(
    ("name", "split"),
    [("isprs-potsdam-dsm", "RGB/test"), ("isprs-vaihingen-dsm", "train"), ("mmhunan", "test")],
)
def test_prepared_heights_are_a_second_raster(prepared, caplog, name, split):
    data = open_set(config(prepared(name), split, second=SecondConfig()), name="source")
    data.check()
    assert data.channels == (3, 1) and caplog.records == []
    for index in range(len(data)):
        heights = data.read(index).image[3]
        assert heights.min() == 0 and heights.max() == pytest.approx(1)


@pytest.mark.parametrize(
    ("setting", "root", "name"),
    [
        ("mfnet/potsdam", "potsdam_dsm", "isprs-potsdam-dsm"),
        ("mfnet/vaihingen", "vaihingen_dsm", "isprs-vaihingen-dsm"),
        ("mfnet/mmhunan", "mmhunan", "mmhunan"),
    ],
)
def test_settings_of_mfnet_name_what_is_prepared(prepared, setting, root, name):
    folder = prepared(name)
    given, sets = open_sets(read_config(setting, [(f"data.roots.{root}", str(folder))], training=True))
    (target,) = sets.targets
    counts = sorted(part.found.files for part in read_manifest(folder).splits.values())
    assert [len(target), len(sets.source)] == counts and target.channels == sets.source.channels == (3, 1)
    assert set(given.evaluate.mean_classes) <= set(given.data.classes)


def test_stored_ids_become_train_ids(prepared):
    folder = prepared("isprs-potsdam")
    data = open_set(config(folder, "IRRG/train"), name="source")
    index = [data.item_name(k) for k in range(len(data))].index("2_10_24_0_72_48")
    stored = read_codes(folder / "ann_dir/IRRG/train/2_10_24_0_72_48.png", colours=False)
    item = data.read(index)
    assert (item.label == np.where(stored == 0, 255, stored.astype(int) - 1)).all()
    pixels = read_image(folder / "img_dir/IRRG/train/2_10_24_0_72_48.png")
    np.testing.assert_allclose(item.image * 255, pixels, atol=1e-4)


def test_classes_in_another_order_take_their_colours_along(prepared):
    folder, order = prepared("isprs-potsdam"), CATALOGUE["isprs-potsdam"].classes[::-1]
    plain = open_set(config(folder, "RGB/val"), name="x").read_label(0)
    data = open_set(config(folder, "RGB/val"), name="x", classes=order)
    assert (data.read_label(0) == np.where(plain == 255, 255, 5 - plain.astype(int))).all()
    assert data.palette == CATALOGUE["isprs-potsdam"].palette[::-1]


def test_other_classes_need_a_label_map(prepared):
    folder, classes = prepared("potsdam-rescue"), ("ground", "building", "vegetation", "car")
    with pytest.raises(
        ConfigError, match=r"'impervious_surface' is no class.*data\.classes has other classes .*label_map"
    ):
        open_set(config(folder, "RGB/val"), name="x", classes=classes)
    merge = {0: "ignore", 1: "ground", 2: "building", 3: "vegetation", 4: "car", 5: "ground"}
    data = open_set(config(folder, "RGB/val", label_map=merge), name="x", classes=classes)
    stored = read_codes(folder / f"ann_dir/RGB/val/{data.item_name(3)}.png", colours=False)
    assert (data.read_label(3) == np.array([255, 0, 1, 2, 3, 0])[stored]).all()
    assert data.palette == ()  # whose colours these are is not known


def test_a_split_that_is_not_there_names_those_that_are(prepared):
    with pytest.raises(
        ConfigError, match=r"set 'x': split='IRRG/vall' is none of RGB/train, RGB/val, .*did you mean 'IRRG/val'"
    ):
        open_set(config(prepared("isprs-potsdam"), "IRRG/vall"), name="x")


def test_a_split_of_a_partial_set_without_files_is_not_there(miniature, prepare_set, tmp_path):
    prepare_set("loveda", miniature("loveda") / "Train", tmp_path / "out")
    with pytest.raises(ConfigError, match="split='Val/Urban' is none of Train/Urban, Train/Rural, which"):
        open_set(config(tmp_path / "out", "Val/Urban"), name="x")


def test_folders_that_are_not_prepared_say_what_to_run(prepared, miniature, tmp_path):
    with pytest.raises(
        DataError, match=rf"set 'x': .* has no {FILE}.*cegate data prepare NAME --root DOWNLOADED --out"
    ):
        open_set(config(miniature("whu"), "train"), name="x")
    folder = shutil.copytree(prepared("whu"), tmp_path / "whu")
    manifest = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, finished=False))
    with pytest.raises(DataError, match=r"set 'x': preparing .* was interrupted; run cegate data prepare again"):
        open_set(config(folder, "aerial/val"), name="x")
    write_manifest(folder, manifest)
    (folder / FILE).write_text((folder / FILE).read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match=r"set 'x': .*is of format version 2, but this cegate reads version 1"):
        open_set(config(folder, "aerial/val"), name="x")


def test_files_that_were_lost_are_noticed(prepared, tmp_path):
    folder = shutil.copytree(prepared("whu"), tmp_path / "whu")
    (folder / "img_dir/aerial/val/1.tif").unlink()
    (folder / "ann_dir/aerial/val/1.png").unlink()
    with pytest.raises(
        DataError, match=r"aerial/val holds 1 images, but 2 were prepared; cegate data check .* tells more"
    ):
        open_set(config(folder, "aerial/val"), name="x")


def test_images_alone_need_no_labels(prepared, tmp_path):
    folder = shutil.copytree(prepared("whu"), tmp_path / "whu")
    shutil.rmtree(folder / "ann_dir")
    data = open_set(config(folder, "satellite/train"), name="unlabelled", labelled=False)
    assert len(data) == 3 and data.read(0).image.shape == (3, 32, 32)


def test_loveda_as_downloaded_has_its_colours_and_says_where_it_comes_from(miniature, tmp_path):
    data = open_set(SetConfig(kind="loveda", root=str(miniature("loveda")), split="Val/Urban"), name="x")
    assert data.palette == CATALOGUE["loveda"].palette
    with pytest.raises(
        DataError, match=r"has no Val/Urban/images_png; LoveDA comes from https://zenodo.*unpacked it is"
    ):
        open_set(SetConfig(kind="loveda", root=str(tmp_path), split="Val/Urban"), name="x")
