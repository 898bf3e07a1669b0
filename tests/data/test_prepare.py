"""Downloads become prepared folders, the same ones however often and in how many steps."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cegate.data.prepared import FILE, Counts, read_manifest
from cegate.data.published import prepare as prepare_module
from cegate.data.published.catalogue import CATALOGUE
from cegate.data.published.check import check_files, check_prepared
from cegate.data.published.miniature import generate
from cegate.data.rasters import Header, read_codes, read_image, write_mask
from cegate.errors import ConfigError, DataError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# --- what is written ------------------------------------------------------------------------------------------------

FOUND = {
    "isprs-potsdam": {"RGB/train": 96, "RGB/val": 56, "IRRG/train": 96, "IRRG/val": 56},
    "potsdam-rescue": {"RGB/train": 96, "RGB/val": 56, "IRRG/train": 96, "IRRG/val": 56},
    "isprs-vaihingen": {"train": 96, "val": 102},
    "loveda": {"Train/Urban": 12, "Train/Rural": 12, "Val/Urban": 12, "Val/Rural": 12},
    "rescuenet": {"train": 3, "val": 2, "test": 2},
    "whu": {"aerial/train": 3, "aerial/val": 2, "aerial/test": 2, "satellite/train": 3, "satellite/test": 2},
    "deepglobe": {"train": 4},
    "massachusetts": {"train": 3, "val": 1, "test": 2},
    "casid": {f"{d}/{p}": n for d in ("SubMs", "TemMs", "TroMs", "TroRf") for p, n in (("train", 75), ("test", 25))},
    "mmhunan": {"train": 6, "test": 3},
    "isprs-potsdam-dsm": {"RGB/train": 18, "RGB/test": 6},
    "isprs-vaihingen-dsm": {"train": 12, "test": 4},
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_miniature_is_prepared_and_passes_the_check(prepared, name):
    folder = prepared(name)
    manifest = read_manifest(folder)
    assert {split: part.found.files for split, part in manifest.splits.items()} == FOUND[name]
    for split, count in FOUND[name].items():
        for kind in ("img_dir", "ann_dir"):
            assert len(list((folder / kind / split).iterdir())) == count
    assert manifest.finished and manifest.classes == CATALOGUE[name].classes
    assert not (folder / prepare_module.ASIDE).exists()
    assert check_prepared(folder) == []


def test_crops_are_named_by_their_box_and_hold_that_part_of_the_tile(prepared, miniature):
    folder = prepared("isprs-potsdam")
    tile = miniature("isprs-potsdam") / "3_Ortho_IRRG/top_potsdam_2_13_IRRG.tif"
    names = sorted(path.name for path in (folder / "img_dir/IRRG/val").glob("2_13_*"))
    assert names[:3] == ["2_13_0_0_48_48.png", "2_13_0_24_48_72.png", "2_13_24_0_72_48.png"]
    crop = read_image(folder / "img_dir/IRRG/val/2_13_24_0_72_48.png")
    assert (crop == read_image(tile)[:, :48, 24:72]).all()
    colours = read_codes(
        miniature("isprs-potsdam") / "5_Labels_all_noBoundary/top_potsdam_2_13_label_noBoundary.tif", colours=True
    )[:48, 24:72]
    stored = read_codes(folder / "ann_dir/IRRG/val/2_13_24_0_72_48.png", colours=False)
    assert ((stored == 2) == (colours == 0x0000FF)).all()
    assert ((stored == 0) == (colours == 0)).all()
    assert (folder / "img_dir/RGB/train/6_7_0_0_48_48.png").is_file()


def test_vaihingen_names_and_a_label_without_image(prepared):
    folder = prepared("isprs-vaihingen")
    assert (folder / "ann_dir/train/area1_0_0_32_32.png").is_file()
    assert not list(folder.rglob("area9_*"))


def test_low_vegetation_is_ignored_or_merged(miniature, prepare_set, prepared, tmp_path):
    prepare_set("potsdam-rescue", miniature("potsdam-rescue"), tmp_path / "merged", low_vegetation="merge", bands="RGB")
    plain, ignored, merged = (
        np.stack([read_codes(path, colours=False) for path in sorted((folder / "ann_dir/RGB/val").iterdir())])
        for folder in (prepared("isprs-potsdam"), prepared("potsdam-rescue"), tmp_path / "merged")
    )
    assert (ignored == np.array([0, 1, 2, 0, 3, 4, 5])[plain]).all()
    assert (merged == np.array([0, 1, 2, 3, 3, 4, 5])[plain]).all()
    assert not (tmp_path / "merged/img_dir/IRRG").exists()


def test_band_sets_can_come_from_rgbir_tiles(miniature, prepare_set, prepared, tmp_path):
    root = miniature("isprs-potsdam")
    roots = [root / "4_Ortho_RGBIR", root / "5_Labels_all_noBoundary"]
    prepare_set("isprs-potsdam", roots, tmp_path / "out", partial_data=False, bands="IRRG,RGBIR")
    crop = "img_dir/IRRG/val/2_13_24_0_72_48.png"
    assert (read_image(tmp_path / "out" / crop) == read_image(prepared("isprs-potsdam") / crop)).all()
    assert len(read_image(tmp_path / "out/img_dir/RGBIR/val/2_13_24_0_72_48.png")) == 4
    with pytest.raises(ConfigError, match=r"--bands=RGB,IRG: 'IRG' is none of RGB, IRRG, RGBIR; did you mean"):
        prepare_set("isprs-potsdam", roots, tmp_path / "other", bands="RGB,IRG")


def test_images_that_stay_whole_are_copied_byte_for_byte(prepared, miniature):
    for name, image, original in (
        ("rescuenet", "test/15005.jpg", "test/test-org-img/15005.jpg"),
        ("deepglobe", "train/104.jpg", "train/104_sat.jpg"),
        ("massachusetts", "val/10378690_15.tiff", "tiff/val/10378690_15.tiff"),
        ("whu", "satellite/test/1.tif", "test_all/image/1.tif"),
    ):
        copied = prepared(name) / "img_dir" / image
        assert copied.read_bytes() == (miniature(name) / original).read_bytes()
        assert read_codes(prepared(name) / "ann_dir" / Path(image).with_suffix(".png"), colours=False).any()


def test_mmhunan_becomes_true_colour_with_elevation_beside(prepared, miniature):
    raw = read_image(miniature("mmhunan") / "train/s2/s2_5.tif").astype(float)
    picture = read_image(prepared("mmhunan") / "img_dir/train/5.png")
    for band, stretched in zip((3, 2, 1), picture, strict=True):
        low, high = raw[band].min(), raw[band].max()
        assert (stretched == np.floor((raw[band] - low) / (high - low) * 255)).all()
    elevation = read_image(prepared("mmhunan") / "dsm_dir/train/5.png")
    assert elevation.shape == (1, 64, 64) and elevation.min() == 0 and elevation.max() == 255
    assert (prepared("mmhunan") / "img_dir/train/9.png").is_file()  # the official validation part trains
    assert (prepared("mmhunan") / "img_dir/test/1239.png").is_file()


def test_potsdam_with_heights_as_mfnet_has_it(prepared, miniature):
    """Tiles stay whole; full labels train, eroded ones test; the 8-bit heights lie beside."""
    folder, root = prepared("isprs-potsdam-dsm"), miniature("isprs-potsdam-dsm")
    assert read_image(folder / "img_dir/RGB/train/2_10.png").shape == (3, 72, 72)
    for tile, split, source in (
        ("2_10", "train", "5_Labels_for_participants/top_potsdam_2_10_label.tif"),
        ("2_11", "test", "5_Labels_for_participants_no_Boundary/top_potsdam_2_11_label_noBoundary.tif"),
    ):
        stored = read_codes(folder / f"ann_dir/RGB/{split}/{tile}.png", colours=False)
        colours = read_codes(root / source, colours=True)
        assert ((stored == 2) == (colours == 0x0000FF)).all() and ((stored == 0) == (colours == 0)).all()
        assert (stored == 0).any() == (split == "test")
        jpeg = root / f"1_DSM_normalisation/dsm_potsdam_02_{tile[2:]}_normalized_lastools.jpg"
        assert (read_image(folder / f"dsm_dir/RGB/{split}/{tile}.png") == read_image(jpeg)).all()


def test_vaihingen_with_heights_in_metres(prepared, miniature):
    folder, root = prepared("isprs-vaihingen-dsm"), miniature("isprs-vaihingen-dsm")
    metres = read_image(folder / "dsm_dir/test/area5.tif")
    stored = read_image(root / "ISPRS_semantic_labeling_Vaihingen/dsm/dsm_09cm_matching_area5.tif")
    assert metres.dtype == np.float32 and (metres == stored).all()
    assert (read_codes(folder / "ann_dir/test/area5.png", colours=False) == 0).any()
    assert (read_codes(folder / "ann_dir/train/area1.png", colours=False) != 0).all()


def test_a_missing_height_is_named(miniature, prepare_set, tmp_path):
    root = copy(miniature("isprs-vaihingen-dsm"), tmp_path / "down")
    (root / "ISPRS_semantic_labeling_Vaihingen/dsm/dsm_09cm_matching_area21.tif").unlink()
    with pytest.raises(DataError, match=r"missing: dsm/dsm_09cm_matching_area21\.tif"):
        prepare_set("isprs-vaihingen-dsm", root, tmp_path / "out", partial_data=False)


def test_the_check_finds_a_second_raster_that_is_gone_or_of_another_size(prepared, tmp_path):
    folder = copy(prepared("mmhunan"), tmp_path / "set")
    write_mask(folder / "dsm_dir/train/2.png", np.zeros((9, 8), np.uint8))
    (folder / "dsm_dir/test/1239.png").unlink()
    problems = check_prepared(folder)
    assert len(problems) == 2
    assert "dsm_dir/train/2.png: the second raster is (8, 9) pixels" in problems[0]
    assert "1 of 3 images have no second raster" in problems[1]


def test_mmhunan_with_the_other_table(miniature, prepare_set, prepared, tmp_path):
    prepare_set("mmhunan", miniature("mmhunan"), tmp_path / "out", label_map="mfnet")
    own, other = (
        read_codes(folder / "ann_dir/train/5.png", colours=False) for folder in (prepared("mmhunan"), tmp_path / "out")
    )
    built = read_codes(miniature("mmhunan") / "train/lc/lc_5.tif", colours=False) == 8
    assert (own[built] == 6).all() and (other[built] == 5).all()


# --- CASID ----------------------------------------------------------------------------------------------------------


def casid_from_1(root):
    """Store 1-5 in the labels that hold ids."""
    for path in root.glob("T*/label*/*.png"):
        write_mask(path, read_codes(path, colours=False) + np.uint8(1))


def test_casid_ids_that_start_at_1_are_recognised(miniature, prepare_set, prepared, tmp_path):
    root = copy(miniature("casid"), tmp_path / "casid")
    casid_from_1(root)
    text, _ = prepare_set("casid", root, tmp_path / "out")
    assert "labels: taken as 1-5, for 16 that were looked at hold a 5 and no 0" in text
    both = [contents(folder / "ann_dir") for folder in (prepared("casid"), tmp_path / "out")]
    assert both[0] == both[1]


def test_casid_ids_that_could_be_either_are_refused_until_said(miniature, prepare_set, tmp_path):
    root = copy(miniature("casid"), tmp_path / "casid")
    casid_from_1(root)
    for path in root.glob("TemMs/label/*.png"):
        ids = read_codes(path, colours=False).copy()
        ids[0, 0] = 0
        write_mask(path, ids)
    with pytest.raises(DataError, match=r"labels of casid hold 0 and 5.*say --label_offset 1 .* or --label_offset 0"):
        prepare_set("casid", root, tmp_path / "out")
    prepare_set("casid", root, tmp_path / "out", label_offset=1)
    assert read_codes(tmp_path / "out/ann_dir/TemMs/test/temms_003_0_0_16_16.png", colours=False)[0, 0] == 255


def test_casid_without_lists_is_split_by_seed(miniature, prepare_set, tmp_path):
    root = copy(miniature("casid"), tmp_path / "casid")
    (tmp_path / "lists").mkdir()
    for path in root.glob("*.txt"):
        path.rename(tmp_path / "lists" / path.name)
    text, manifest = prepare_set("casid", root, tmp_path / "seeded", seed=3)
    assert "SubMs: no lists, so train and test are drawn with seed 3" in text
    assert manifest.splits["SubMs/train"].found.images == round(4 * 196 / 284)
    text, listed = prepare_set("casid", root, tmp_path / "listed", lists=tmp_path / "lists")
    assert "SubMs: train and test by lists" in text
    assert [s.name for s in listed.sources if s.split == "TroRf/test"] == ["trorf_003"]
    with pytest.raises(DataError, match=r"--lists .*casid has no <domain>_train\.txt"):
        prepare_set("casid", root, tmp_path / "other", lists=root)


def test_casid_lists_name_what_is_missing_and_may_not_overlap(miniature, prepare_set, tmp_path):
    root = copy(miniature("casid"), tmp_path / "casid")
    (root / "SubMs_test.txt").write_text("subms_077\n")
    with pytest.raises(DataError, match=r"missing: SubMs/image/subms_077; casid comes from"):
        prepare_set("casid", root, tmp_path / "out", partial_data=False)
    text, _ = prepare_set("casid", root, tmp_path / "out")
    assert "SubMs: train and test by lists, 1 images in neither" in text
    (root / "SubMs_test.txt").write_text("subms_000.png\n")
    with pytest.raises(DataError, match="lists of SubMs: subms_000 and 0 more are in train and in test"):
        prepare_set("casid", root, tmp_path / "out")


def test_casid_crops_as_processed_upstream(miniature, prepare_set, tmp_path):
    for name in ("subms_000", "subms_001"):
        for kind, new in (("image", f"{name}.png"), ("label", f"{name}-label.png")):
            part = "all_train" if name.endswith("0") else "all_test"
            target = tmp_path / "casid/SubMs" / part / kind / new
            target.parent.mkdir(parents=True)
            shutil.copy(miniature("casid") / "SubMs" / kind / new, target)
    _, manifest = prepare_set("casid", tmp_path / "casid", tmp_path / "out", crop=80)
    assert [(s.split, s.name) for s in manifest.sources] == [("SubMs/test", "subms_001"), ("SubMs/train", "subms_000")]
    assert manifest.splits["SubMs/train"].expected.images is None


# --- published numbers ----------------------------------------------------------------------------------------------


def test_tiles_of_the_published_sizes_give_the_published_numbers(
    miniature, prepare_set, vaihingen_sizes, tmp_path, monkeypatch
):
    def published_header(path):
        area = path.stem.removeprefix("top_mosaic_09cm_area")
        return Header(*vaihingen_sizes.get(area, (6000, 6000)), 3, "uint8")

    monkeypatch.setattr(prepare_module, "read_header", published_header)
    for name, numbers in (("isprs-potsdam", [3456, 2016] * 2), ("isprs-vaihingen", [344, 398])):
        _, manifest = prepare_set(name, miniature(name), tmp_path / "out", crop=512, dry_run=True, partial_data=False)
        assert [split.found.files for split in manifest.splits.values()] == numbers
        assert not manifest.partial
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named_with_their_origin_and_layout(miniature, prepare_set, tmp_path):
    root = copy(miniature("isprs-potsdam"), tmp_path / "download")
    (root / "5_Labels_all_noBoundary/top_potsdam_2_13_label_noBoundary.tif").unlink()
    (root / "5_Labels_for_participants_no_Boundary/top_potsdam_2_10_label_noBoundary.tif").unlink()
    (root / "5_Labels_all_noBoundary/top_potsdam_2_10_label_noBoundary.tif").unlink()
    with pytest.raises(
        DataError,
        match=r"isprs-potsdam: 23 of 24 images in RGB/train, 13 of 14 images in RGB/val, .*; missing: "
        r"top_potsdam_2_10_label_noBoundary.tif, top_potsdam_2_13_label_noBoundary.tif; isprs-potsdam comes from ISPRS"
        r".*the layout is 2_Ortho_RGB/.*; add what is missing, or take what is there with --partial",
    ):
        prepare_set("isprs-potsdam", root, tmp_path / "out", partial_data=False)
    assert not (tmp_path / "out").exists()
    text, manifest = prepare_set("isprs-potsdam", root, tmp_path / "out")
    assert manifest.partial and manifest.splits["RGB/val"].found.images == 13
    assert json.loads((tmp_path / "out" / FILE).read_text())["partial"] is True
    assert "RGB/val" in text and "13" in text


def test_an_image_without_label_is_named(miniature, prepare_set, tmp_path):
    root = copy(miniature("deepglobe"), tmp_path / "download")
    (root / "train/104_mask.png").unlink()
    with pytest.raises(DataError, match=r"deepglobe: 3 of 6226 images in train; missing: the label of .*104_sat\.jpg"):
        prepare_set("deepglobe", root, tmp_path / "out", partial_data=False)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_folder_with_something_else_says_what_it_should_be(prepare_set, tmp_path, name):
    (tmp_path / "download").mkdir()
    (tmp_path / "download/readme.txt").write_text("x")
    with pytest.raises(DataError, match=rf"no image with a label found below .*download.*; {name} comes from .*layout"):
        prepare_set(name, tmp_path / "download", tmp_path / "out")
    with pytest.raises(DataError, match=r"--root .*nowhere is neither a folder nor a \.zip file"):
        prepare_set(name, tmp_path / "nowhere", tmp_path / "out")


def test_images_smaller_than_a_crop_are_named(miniature, prepare_set, tmp_path):
    with pytest.raises(DataError, match=r"images_png/0\.png: a side of 64 px is shorter than the crop of 512 px"):
        prepare_set("loveda", miniature("loveda"), tmp_path / "out", crop=512)


def test_a_label_value_out_of_range_names_file_value_and_count(miniature, prepare_set, tmp_path):
    root = copy(miniature("loveda"), tmp_path / "loveda")
    path = root / "Val/Rural/masks_png/2523.png"
    ids = read_codes(path, colours=False).copy()
    ids[5, :3] = 9
    write_mask(path, ids)
    with pytest.raises(DataError, match=r"2523\.png: values out of range: 9 \(3 px\); labels of this set hold 0, 1, 2"):
        prepare_set("loveda", root, tmp_path / "out")


def test_a_label_of_another_size_is_named(miniature, prepare_set, tmp_path):
    root = copy(miniature("whu"), tmp_path / "whu")
    write_mask(root / "val/label/1.tif", np.zeros((32, 30), np.uint8))
    with pytest.raises(DataError, match=r"val/label/1\.tif is 30x32 pixels, but its image .*1\.tif is 32x32"):
        prepare_set("whu", root, tmp_path / "out")


def test_a_missing_elevation_is_refused_though_images_and_labels_are_complete(
    miniature, prepare_set, tmp_path, monkeypatch
):
    root = copy(miniature("mmhunan"), tmp_path / "mmhunan")
    tests = " ".join(path.stem.removeprefix("s2_") for path in (root / "test/s2").iterdir())
    whole = CATALOGUE["mmhunan"]
    row = whole.row | {"listed": whole.row["listed"] | {"names": tests}}
    counts = {"train": Counts(6, 6), "test": Counts(3, 3)}
    monkeypatch.setitem(CATALOGUE, "mmhunan", dataclasses.replace(whole, row=row, splits=counts))
    prepare_set("mmhunan", root, tmp_path / "whole", partial_data=False)
    (root / "train/topo/topo_5.tif").unlink()
    with pytest.raises(DataError, match=r"mmhunan: numbers are as published; missing: topo/topo_5\.tif; .*--partial"):
        prepare_set("mmhunan", root, tmp_path / "out", partial_data=False)
    prepare_set("mmhunan", root, tmp_path / "out")
    assert not (tmp_path / "out/dsm_dir/train/5.png").exists() and (tmp_path / "out/img_dir/train/5.png").is_file()


def test_a_full_disk_is_one_line(miniature, prepare_set, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"\.png cannot be written \(No space left on device\); .*which goes on"):
        prepare_set("mmhunan", miniature("mmhunan"), tmp_path / "out")


# --- the same folder, however it came about -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["isprs-vaihingen", "whu", "mmhunan"])
def test_once_more_changes_nothing_and_anew_gives_the_same_bytes(miniature, prepare_set, prepared, tmp_path, name):
    folder = copy(prepared(name), tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    prepare_set(name, miniature(name), folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    prepare_set(name, miniature(name), tmp_path / "anew", workers=2 if name == "whu" else 1)
    assert contents(tmp_path / "anew") == contents(folder)


def test_an_interrupted_call_goes_on_and_keeps_what_is_finished(
    miniature, prepare_set, prepared, tmp_path, monkeypatch
):
    name, done, out = "loveda", [], tmp_path / "out"
    real = prepare_module._convert

    def convert(job, out):
        if len(done) == 5:
            (out / prepare_module.ASIDE / "1-half.png").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(job)
        return real(job, out)

    monkeypatch.setattr(prepare_module, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        prepare_set(name, miniature(name), out)
    assert not read_manifest(out).finished
    assert check_prepared(out)[0] == f"{out}: preparing was interrupted; run cegate data prepare again"
    half = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.parent.name != prepare_module.ASIDE}
    assert len(half) == 5 * 8
    monkeypatch.undo()
    prepare_set(name, miniature(name), out)
    assert {path: path.stat().st_mtime_ns for path in half} == half
    assert contents(out) == contents(prepared(name))


def test_a_lost_file_is_written_again(miniature, prepare_set, prepared, tmp_path):
    out = copy(prepared("whu"), tmp_path / "out")
    (out / "ann_dir/aerial/val/1.png").unlink()
    assert "1 of 2 images have no mask" in " ".join(check_prepared(out))
    prepare_set("whu", miniature("whu"), out)
    assert contents(out) == contents(prepared("whu"))


def test_what_was_partial_can_be_completed(miniature, prepare_set, prepared, tmp_path):
    root = copy(miniature("loveda"), tmp_path / "loveda")
    shutil.move(root / "Val", tmp_path / "Val")
    prepare_set("loveda", root, tmp_path / "out")
    assert not read_manifest(tmp_path / "out").splits["Val/Urban"].found.files
    prepare_set("loveda", [root, tmp_path / "Val"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared("loveda"))


def test_a_dry_run_writes_nothing(miniature, prepare_set, prepared, tmp_path):
    text, _ = prepare_set("casid", miniature("casid"), tmp_path / "out", dry_run=True)
    assert "dry run: 400 of 400 images with labels would be written" in text
    assert not (tmp_path / "out").exists()
    out = copy(prepared("casid"), tmp_path / "some")
    next((out / "img_dir/TroRf/test").iterdir()).unlink()
    before = contents(out)
    text, _ = prepare_set("casid", miniature("casid"), out, dry_run=True)
    assert "dry run: 1 of 400" in text and contents(out) == before


def test_zips_with_and_without_a_folder_give_the_same(miniature, prepare_set, prepared, tmp_path):
    root = miniature("isprs-vaihingen")
    downloads = tmp_path / "down loads"
    downloads.mkdir()
    main, labels = "ISPRS_semantic_labeling_Vaihingen", "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE"
    shutil.make_archive(str(downloads / main), "zip", root, main)  # one sub-folder
    shutil.make_archive(str(downloads / labels), "zip", root / labels)  # top level
    prepare_set("isprs-vaihingen", downloads, tmp_path / "folder of zips")
    prepare_set("isprs-vaihingen", sorted(downloads.iterdir()), tmp_path / "zips")
    assert contents(tmp_path / "folder of zips") == contents(tmp_path / "zips") == contents(prepared("isprs-vaihingen"))
    archive = shutil.make_archive(str(tmp_path / "deepglobe"), "zip", miniature("deepglobe"))
    prepare_set("deepglobe", Path(archive), tmp_path / "out")  # images are copied out of the zip
    assert contents(tmp_path / "out") == contents(prepared("deepglobe"))


def test_a_zip_in_a_zip_is_to_be_unpacked(miniature, prepare_set, tmp_path):
    (tmp_path / "download").mkdir()
    shutil.make_archive(str(tmp_path / "download/train"), "zip", miniature("deepglobe"))
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path / "download")
    with pytest.raises(
        DataError, match=r"no image .*; unpack .*all\.zip, a zip in a zip is not looked into; deepglobe"
    ):
        prepare_set("deepglobe", archive, tmp_path / "out")


def test_a_damaged_zip_is_named(prepare_set, tmp_path):
    (tmp_path / "whu.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"whu\.zip: File is not a zip file; download it again"):
        prepare_set("whu", tmp_path / "whu.zip", tmp_path / "out")


# --- folders that hold something else -------------------------------------------------------------------------------


def test_a_folder_of_another_kind_is_refused(miniature, prepare_set, prepared, tmp_path):
    whu = copy(prepared("whu"), tmp_path / "whu")
    with pytest.raises(DataError, match="holds whu with no options, not deepglobe with no options; give another"):
        prepare_set("deepglobe", miniature("deepglobe"), whu)
    loveda = copy(prepared("loveda"), tmp_path / "loveda")
    with pytest.raises(DataError, match="holds loveda with crop=32, not loveda with crop=16"):
        prepare_set("loveda", miniature("loveda"), loveda, crop=16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(DataError, match="mine is not empty and no prepared data set; give a new folder"):
        prepare_set("whu", miniature("whu"), tmp_path / "mine")


def test_other_files_than_those_prepared_are_refused(miniature, prepare_set, prepared, tmp_path):
    out, root = copy(prepared("whu"), tmp_path / "out"), copy(miniature("whu"), tmp_path / "whu")
    image = (root / "val/image/1.tif").read_bytes()
    (root / "val/image/1.tif").write_bytes(image + b" ")
    with pytest.raises(DataError, match="was prepared from other files: 1 of aerial/val has files of another size now"):
        prepare_set("whu", root, out)
    (root / "val/image/1.tif").unlink()
    with pytest.raises(DataError, match="other files: 1 of aerial/val is not in this download; give another folder"):
        prepare_set("whu", root, out)
    (out / "img_dir/aerial/val/stranger.tif").write_bytes(image)
    with pytest.raises(DataError, match=r"stranger\.tif \(1 such files\) is not of this data set; move it away"):
        prepare_set("whu", miniature("whu"), out)


def test_another_format_version_and_a_damaged_manifest_are_refused(miniature, prepare_set, prepared, tmp_path):
    out = copy(prepared("whu"), tmp_path / "out")
    text = (out / FILE).read_text()
    (out / FILE).write_text(text.replace('"format": 1', '"format": 7'))
    message = "is of format version 7, but this cegate reads version 1; prepare the set again into an empty folder"
    for call in (lambda: prepare_set("whu", miniature("whu"), out), lambda: check_prepared(out)):
        with pytest.raises(DataError, match=message):
            call()
    (out / FILE).write_text(text[:100])
    with pytest.raises(DataError, match="is damaged"):
        check_prepared(out)
    (out / FILE).write_text(text.replace('"found"', '"lost"'))
    with pytest.raises(DataError, match="is damaged"):
        check_prepared(out)


def test_options_of_other_sets_and_wrong_values_are_named():
    for name, given, message in (
        ("whu", {"crop": "512"}, "whu does not take --crop; options of this set: none"),
        ("isprs-potsdam", {"seed": "1"}, "isprs-potsdam does not take --seed; options of this set: --crop, --bands"),
        ("potsdam-rescue", {"low_vegetation": "merg"}, "--low_vegetation=merg is none of ignore, merge; did you mean"),
        ("loveda", {"crop": "-3"}, "--crop=-3 is not accepted; expected a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            CATALOGUE[name].parse_options(given)


# --- the check ------------------------------------------------------------------------------------------------------


def test_the_check_finds_values_out_of_range_and_sizes_that_differ(prepared, tmp_path):
    out = copy(prepared("isprs-vaihingen"), tmp_path / "out")
    path = out / "ann_dir/val/area2_0_0_32_32.png"
    ids = read_codes(path, colours=False).copy()
    ids[0, :4] = 7, 7, 255, 7
    write_mask(path, ids)
    write_mask(out / "ann_dir/train/area1_0_0_32_32.png", np.ones((32, 31), np.uint8))
    (out / "img_dir/train/area3_0_0_32_32.png").write_bytes(b"")
    found = check_prepared(out)
    assert len(found) == 3
    assert "area1_0_0_32_32.png: the label is 31x32 pixels, but its image" in found[0]
    assert "area3_0_0_32_32.png: cannot be read" in found[1]
    assert "area2_0_0_32_32.png: values out of range: 7 (3 px), 255 (1 px); labels of this set hold 0, 1" in found[2]


def test_the_check_counts(prepared, tmp_path):
    out = copy(prepared("whu"), tmp_path / "out")
    for folder, suffix in (("img_dir", ".tif"), ("ann_dir", ".png")):
        (out / folder / f"aerial/test/1{suffix}").unlink()
    assert "aerial/test: 1 images, but the manifest has 2; run cegate data prepare again" in check_prepared(out)[0]


def test_any_labels_can_be_checked(prepared):
    folder = prepared("loveda")
    assert check_files(folder, "ann_dir/**/*.png", range(8)) == []
    assert check_files(folder, "ann_dir/Val/*/*.png", range(8), images="img_dir/Val/*/*.png", workers=2) == []
    found = check_files(folder, "ann_dir/Val/*/*.png", range(7))
    assert found and all("values out of range: 7 (" in line for line in found)
    with pytest.raises(DataError, match="no labels match"):
        check_files(folder, "labels/*.png", range(8))


def test_bands_and_sources_are_on_record(prepared):
    manifest = read_manifest(prepared("isprs-potsdam"))
    assert manifest.splits["IRRG/train"].bands == ("infrared", "red", "green")
    assert manifest.splits["RGB/val"].bands == ("red", "green", "blue")
    first = manifest.sources[0]
    assert (first.split, first.name, first.image) == ("IRRG/train", "2_10", "top_potsdam_2_10_IRRG.tif")
    assert first.image_bytes > 0 and len(manifest.sources) == 2 * 38
    assert dict(manifest.options) == {"crop": 48, "bands": "RGB,IRRG"}


# --- the miniatures -------------------------------------------------------------------------------------------------


def test_miniatures_have_the_layouts_and_quirks_of_the_downloads(miniature, prepare_set, tmp_path):
    paths = {
        "isprs-potsdam": (
            "2_Ortho_RGB/top_potsdam_2_10_RGB.tif", "3_Ortho_IRRG/top_potsdam_7_13_IRRG.tif",
            "4_Ortho_RGBIR/top_potsdam_4_15_RGBIR.tif", "5_Labels_all/top_potsdam_2_10_label.tif",
            "5_Labels_for_participants_no_Boundary/top_potsdam_2_10_label_noBoundary.tif",
            "1_DSM/dsm_potsdam_02_10.tif", "1_DSM_normalisation/dsm_potsdam_07_8_normalized_lastools.jpg",
        ),
        "isprs-vaihingen": (
            "ISPRS_semantic_labeling_Vaihingen/top/top_mosaic_09cm_area38.tif",
            "ISPRS_semantic_labeling_Vaihingen/dsm/dsm_09cm_matching_area1.tif",
            "ISPRS_semantic_labeling_Vaihingen/gts_for_participants/top_mosaic_09cm_area1.tif",
            "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE/top_mosaic_09cm_area9_noBoundary.tif",
        ),
        "loveda": ("Train/Urban/images_png/1366.png", "Val/Urban/masks_png/3514.png", "Test/Urban/images_png/4191.png"),
        "rescuenet": ("test/test-org-img/15005.jpg", "test/test-label-img/15005_lab.png"),
        "whu": ("val/image/0.tif", "test_all/label/1.tif"),
        "deepglobe": ("train/104_sat.jpg", "train/104_mask.png", "valid/5_sat.jpg"),
        "massachusetts": ("tiff/test/10378690_15.tiff", "tiff/test_labels/10378690_15.tif"),
        "casid": ("SubMs/image/subms_000.png", "TroMs/label_id/troms_000-label.png", "TroRf_test.txt"),
        "mmhunan": ("test/s2/s2_1239.tif", "val/lc/9.tif", "train/lc/lc_1.tif", "train/s1/s1_1.tif"),
    }  # fmt: skip
    for name, files in paths.items():
        assert [file for file in files if not (miniature(name) / file).is_file()] == [], name
    text, _ = prepare_set("isprs-potsdam", miniature("isprs-potsdam"), tmp_path / "out", bands="RGB")
    assert "top_potsdam_4_12_label_noBoundary.tif: 5 px of colours that mean nothing are ignored" in text


def test_a_miniature_depends_on_its_seed_only(miniature, tmp_path):
    for folder, seed in (("same", 0), ("other", 1)):
        generate("mmhunan", tmp_path / folder, seed)
    assert contents(tmp_path / "same") == contents(miniature("mmhunan"))
    assert contents(tmp_path / "other").keys() == contents(tmp_path / "same").keys()
    assert contents(tmp_path / "other") != contents(tmp_path / "same")


def test_a_killed_process_is_one_line():
    killed = prepare_module.run_all(signal.raise_signal, [signal.SIGKILL] * 2, 2, "", Console(quiet=True))
    with pytest.raises(DataError, match=r"a process was killed, .*; use fewer --workers and call it again, which goes"):
        list(killed)
