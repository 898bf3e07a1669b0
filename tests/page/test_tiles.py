from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from cegate.page.tiles import SIDE_PX, choose_tiles, class_map, confidence_map, photo, worst_mistake


def picture(uri: str) -> Image.Image:
    head, _, data = uri.partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_worst_come_first_then_the_best():
    chosen = list(choose_tiles([0.5, 0.9, 0.1, 0.7, 0.3, 0.8], 2))
    assert chosen == [("worst 1", 2), ("worst 2", 4), ("best 1", 1), ("best 2", 5)]


@pytest.mark.parametrize(("tiles", "places"), [(1, ["best 1"]), (3, ["worst 1", "best 1", "best 2"]), (0, [])])
def test_no_tile_is_both(tiles, places):
    chosen = list(choose_tiles([number / 10 for number in range(tiles)], 3))
    assert [place for place, _ in chosen] == places
    assert len({index for _, index in chosen}) == len(chosen)


def test_tiles_without_labels_are_left_out():
    assert {index for _, index in choose_tiles([None, 0.4, 0.6], 3)} == {1, 2}


def test_the_worst_mistake_is_the_most_frequent():
    counts = np.array([[50, 30], [10, 10]])
    assert worst_mistake(counts, ["road", "a & b"]) == "30.0 % of pixels are road taken for a & b"
    assert worst_mistake(np.diag([3, 4]), ["a", "b"]) == "no pixel is wrong"


def test_a_class_map_shows_the_palette_and_leaves_ignored_pixels_clear():
    mask = np.array([[0, 1], [255, 1]], np.uint8)
    shown = np.asarray(picture(class_map(mask, ["#102030", "#FFFFFF"])).convert("RGBA"))
    assert shown[0, 0].tolist() == [16, 32, 48, 255]
    assert shown[0, 1].tolist() == shown[1, 1].tolist() == [255, 255, 255, 255]
    assert shown[1, 0, 3] == 0


def test_a_confidence_map_brightens_with_the_share():
    shown = np.asarray(picture(confidence_map(np.array([[0.25, 0.6, 1.0]], np.float32), 4)).convert("L"))[0]
    assert shown[0] < shown[1] < shown[2]


@pytest.mark.parametrize("bands", [1, 2, 3, 6])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (3, 700), (1100, 40)])
def test_pictures_of_any_size_and_bands_fit(bands, height, width):
    image = np.full((bands, height, width), 0.5, np.float32)
    image[0, 0, 0] = np.nan
    for uri in (
        photo(image),
        class_map(np.zeros((height, width), np.uint8), ["#000000"]),
        confidence_map(np.ones((height, width), np.float32), 2),
    ):
        side = max(picture(uri).size)
        assert min(max(height, width), SIDE_PX // 2) <= side <= SIDE_PX
