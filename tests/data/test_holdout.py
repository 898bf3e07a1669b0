"""Parts of a set: what is held out, and lists of names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from cegate.config import SetConfig
from cegate.data.datasets import open_set
from cegate.data.holdout import hold_out
from cegate.data.rasters import write_image, write_mask
from cegate.errors import DataError

CLASSES = ["ground", "road"]


def grid(side: int, step: float, size: float) -> np.ndarray:
    corners = np.array(list(itertools.product(range(side), repeat=2)), float) * step
    return np.concatenate((corners, corners + size), axis=1)


def shared_area(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("size", [1.0, 1.5], ids=["side by side", "overlapping"])
def test_a_place_that_is_held_out_shares_no_ground_with_the_rest(seed, size):
    boxes = grid(6, 1.0, size)
    parts = hold_out([f"t{k}" for k in range(36)], boxes, 0.2, seed)
    assert len(parts.held) == 7 and not set(parts.held) & set(parts.kept)
    assert all(shared_area(boxes[a], boxes[b]) == 0 for a in parts.held for b in parts.kept)
    assert (len(parts.held) + len(parts.kept) == 36) == (size == 1.0)
    assert parts == hold_out([f"t{k}" for k in range(36)], boxes, 0.2, seed)


def test_images_of_one_place_cannot_be_divided():
    with pytest.raises(DataError, match="all images overlap by their georeferences"):
        hold_out(["a", "b", "c"], grid(3, 0.01, 1.0)[:3], 0.3)
    with pytest.raises(DataError, match="one image cannot be divided"):
        hold_out(["a"], None, 0.3)


def test_whole_folders_else_neighbours_by_name():
    names = [f"{folder}/{k}" for folder in "abcde" for k in range(4)]
    by_folder = hold_out(names, None, 0.2, seed=3)
    assert len(by_folder.held) == 4 and len({names[k][0] for k in by_folder.held}) == 1
    assert by_folder.how == f"by folder ({names[by_folder.held[0]][0]})"
    divisions = {hold_out(names, None, 0.2, seed).held for seed in range(9)}
    assert len(divisions) > 1  # a function of the seed
    coarse = hold_out([f"{folder}/{k}" for folder in "ab" for k in range(10)], None, 0.1)
    assert coarse.how.startswith("by name (") and len(coarse.held) == 2
    held = np.array(coarse.held)
    assert (np.diff(held) == 1).all()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        write_image(_made(tmp_path / "images" / f"t{k}.png"), rng.integers(0, 255, (3, 16, 16), np.uint8))
        write_mask(_made(tmp_path / "masks" / f"t{k}.png"), rng.integers(0, 2, (16, 16), np.uint8))
    return tmp_path


def _made(path):
    path.parent.mkdir(exist_ok=True)
    return path


def names_of(opened):
    return [opened.item_name(k) for k in range(len(opened))]


def test_the_two_parts_of_a_set_are_all_of_it(folder):
    cfg = SetConfig(root=str(folder), val_fraction=0.34)
    kept, held = (open_set(cfg, name="source", classes=CLASSES, seed=1, held_out=part) for part in (False, True))
    assert sorted(names_of(kept) + names_of(held)) == [f"t{k}" for k in range(6)] and len(held) == 2
    assert kept.division == held.division and kept.division.startswith("2 of 6 images are held out by name (t")
    kept.check(training=True)
    assert sum(kept.shares.values()) == pytest.approx(1)


def test_tiles_that_know_their_place_are_divided_by_it(tmp_path):
    for k in range(4):
        for name, count in (("images", 3), ("masks", 1)):
            place = {"crs": "EPSG:32632", "transform": from_origin(16.0 * k, 100, 1, 1)}
            profile = {"driver": "GTiff", "height": 16, "width": 16, "count": count, "dtype": "uint8", **place}
            with rasterio.open(_made(tmp_path / name / f"{'wxyz'[k]}.tif"), "w", **profile) as dst:
                dst.write(np.full((count, 16, 16), k % 2, np.uint8))
    opened = open_set(SetConfig(root=str(tmp_path), val_fraction=0.25), name="source", classes=CLASSES, held_out=True)
    assert names_of(opened) in (["w"], ["z"]) and "by place (the " in opened.division


def test_a_list_of_names_chooses(folder):
    (folder / "train.txt").write_text("# two names\nt4.png\n\nimages/t1\nt4\n")
    (folder / "masks/t5.png").unlink()  # what is not named needs no partner
    cfg = SetConfig(root=str(folder), split="train.txt")
    assert names_of(open_set(cfg, name="source", classes=CLASSES)) == ["t1", "t4"]
    (folder / "train.txt").write_text("t4\nt44\n")
    with pytest.raises(DataError, match="1 of 2 names in split are no image, first 't44'; did you mean 't4"):
        open_set(cfg, name="source", classes=CLASSES)
    (folder / "train.txt").write_text("\n")
    with pytest.raises(DataError, match="names nothing"):
        open_set(cfg, name="source", classes=CLASSES)
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read"):
        open_set(SetConfig(root=str(folder), split="nowhere.txt"), name="source", classes=CLASSES)
