"""Layouts of folders, told by names alone."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from cegate.data.layout import find_parts


def parts_of(*names):
    return find_parts([PurePosixPath(name) for name in names])


@pytest.mark.parametrize(
    ("names", "globs", "pairs"),
    [
        (["images/1.jpg", "images/2.jpg", "masks/1.png", "masks/2.png"], ("images/*", "masks/*"), ["1", "2"]),
        (
            ["img/a_img.png", "gt/a_gt.png", "img/b_img.png", "gt/b_gt.png"],
            ("img/*_img.png", "gt/*_gt.png"),
            ["a", "b"],
        ),
        (["RGB/RGB_x1.tif", "RGB/RGB_x2.tif", "label/mask_x1.tif", "label/mask_x2.tif"], None, ["x1", "x2"]),
        (["p/images/1.tif", "q/images/1.tif", "p/labels/1.tif", "q/labels/1.tif"], ("*/images/*", "*/labels/*"), None),
        (["images/p/1.tif", "images/q/1.tif", "ann/p/1.tif", "ann/q/1.tif"], ("images/*/*", "ann/*/*"), ["p/1", "q/1"]),
        (["a/b/images/1.tif", "c/images/1.tif", "a/b/gt/1.tif", "c/gt/1.tif"], ("**/images/*", "**/gt/*"), None),
        (["7_sat.jpg", "7_mask.png", "8_sat.jpg", "8_mask.png"], ("*_sat.jpg", "*_mask.png"), ["7", "8"]),
        (["7.jpg", "7.png", "10.jpg", "10.png"], ("*.jpg", "*.png"), ["7", "10"]),
        (["a/7.jpg", "a/7.png", "b/7.jpg", "b/7.png"], ("*/*.jpg", "*/*.png"), ["a/7", "b/7"]),
        (["img1.png", "img2.png", "gt1.png", "gt2.png"], ("img*", "gt*"), ["1", "2"]),
        (["S2/x.tif", "LULC/x.tif", "S2/y.tif", "LULC/y.tif"], ("S2/*", "LULC/*"), ["x", "y"]),
        (["Bilder/1.tif", "Masken/1.tif", "Bilder/2.tif", "Masken/2.tif"], ("Bilder/*", "Masken/*"), ["1", "2"]),
        (["JPEGImages/1.jpg", "gtFine/1.png", "JPEGImages/2.jpg", "gtFine/2.png"], None, ["1", "2"]),
        (["images/1.tif", "images/2.tif", "roads.gpkg"], ("images/*", "roads.gpkg"), ["1", "2"]),
        (["images/1.tif", "images/2.tif", "labels/1.shp", "labels/2.shp"], ("images/*", "labels/*.shp"), ["1", "2"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_usual_layouts(names, globs, pairs):
    part = parts_of(*names)[0]
    assert part.is_exact
    assert globs is None or (part.images, part.masks) == globs
    assert pairs is None or [name for name, *_ in part.pairs] == pairs
    assert len(part.pairs) == 2


def test_train_val_and_test_are_parts_of_their_own():
    names = [f"{kind}/{stage}/{k}.png" for kind in ("images", "labels") for stage in ("train", "val") for k in range(2)]
    assert {part.stage: part.images for part in parts_of(*names)} == {"train": "images/train/*", "val": "images/val/*"}
    names = [f"{stage}_{kind}/{k}.png" for kind in ("images", "labels") for stage in ("train", "val") for k in range(2)]
    assert {part.stage: part.masks for part in parts_of(*names)} == {"train": "train_labels/*", "val": "val_labels/*"}


def test_what_lies_beside_images_is_guessed_to_be_masks_where_nothing_is_called_so():
    names = ["images/1.png", "roads/1.png", "images/2.png", "roads/2.png"]
    (part,) = parts_of(*names)
    assert (part.images, part.masks, part.is_guess) == ("images/*", "roads/*", True)
    assert not any(part.is_guess or "roads" in part.masks for part in parts_of(*names, "gt/1.png"))
    assert parts_of("red/1.png", "roads/1.png") == parts_of("images/1.png", "roads/2.png") == []


def test_files_without_a_partner_are_named():
    (part,) = parts_of("images/1.png", "images/2.png", "masks/1.png", "masks/3.png")
    assert not part.is_exact and [name for name, *_ in part.pairs] == ["1"]
    assert (*part.lonely_images, *part.lonely_masks) == (PurePosixPath("images/2.png"), PurePosixPath("masks/3.png"))
    (part,) = parts_of("1.tif", "1_mask.tif")  # the glob of the images finds the mask too
    assert not part.is_exact and not part.lonely_images
    assert parts_of("images/1.png", "images/2.png") == [] and parts_of() == []
