from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate.config import AugmentConfig, SetConfig
from cegate.data.datasets import open_set
from cegate.data.sets import Item
from cegate.data.transforms import (
    Crop,
    augment,
    augment_from,
    distort_colours,
    draw_crop,
    fill_up,
    normalise,
    scale_saturation,
    turn_hue,
)

PLAIN = AugmentConfig(resize=[1.0, 1.0], flip=False, photometric=False)


def item(height=40, width=50, bands=3, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.random((bands, height, width), np.float32)
    return Item(image, rng.integers(0, 4, (height, width), np.uint8), "x")


def rng(seed=0):
    return np.random.default_rng(seed)


SIDE = st.integers(1, 70)


@settings(max_examples=60, deadline=None)
@given(height=SIDE, width=SIDE, bands=st.sampled_from([1, 3, 5]), crop=st.integers(1, 64), seed=st.integers(0, 99))
def test_any_picture_gives_a_crop_of_at_most_the_asked_size(height, width, bands, crop, seed):
    image, label = augment(item(height, width, bands), rng(seed), crop=crop, cfg=AugmentConfig())
    assert image.shape == (bands, *label.shape)
    assert min(label.shape) > 0 and max(label.shape) <= crop
    assert image.dtype == np.float32
    assert label.dtype == np.uint8
    assert image.min() >= 0
    assert image.max() <= 1


@given(seed=st.integers(0, 1000))
def test_equal_generators_give_equal_crops(seed):
    sample = item()
    before = sample.image.copy()
    one, two = (augment(sample, rng(seed), crop=24, cfg=AugmentConfig()) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert (sample.image == before).all()


def test_a_small_picture_is_filled_up_right_and_below():
    sample = item(10, 20)
    image, label = fill_up(*augment(sample, rng(), crop=32, cfg=PLAIN), 32)
    assert image.shape == (3, 32, 32) and label.shape == (32, 32)
    assert (image[:, :10, :20] == sample.image).all()
    assert (label[:10, :20] == sample.label).all()
    assert (image[:, 10:] == 0).all() and (image[:, :, 20:] == 0).all()
    assert (label[10:] == 255).all() and (label[:, 20:] == 255).all()


def test_a_crop_without_changes_is_a_part_of_the_picture():
    sample = item()
    sample.image[0] = np.arange(40)[:, None] / 64
    sample.image[1] = np.arange(50) / 64
    image, label = augment(sample, rng(3), crop=16, cfg=PLAIN)
    top, left = int(image[0, 0, 0] * 64), int(image[1, 0, 0] * 64)
    assert (image == sample.image[:, top : top + 16, left : left + 16]).all()
    assert (label == sample.label[top : top + 16, left : left + 16]).all()


def test_a_flip_mirrors_image_and_label_together():
    cfg = AugmentConfig(resize=[1.0, 1.0], photometric=False)
    sample = item(16, 16)
    results = [augment(sample, rng(seed), crop=16, cfg=cfg) for seed in range(20)]
    flipped = [not (image == sample.image).all() for image, _ in results]
    assert 4 < sum(flipped) < 16
    image, label = results[flipped.index(True)]
    assert (image[:, :, ::-1] == sample.image).all()
    assert (label[:, ::-1] == sample.label).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_resized_crop_equals_a_crop_of_the_resized_picture(data):
    size = data.draw(st.tuples(SIDE, SIDE))
    scaled = tuple(max(1, round(side * data.draw(st.floats(0.5, 2)))) for side in size)
    top, left = (data.draw(st.integers(0, side - 1)) for side in scaled)
    height, width = (data.draw(st.integers(1, side - start)) for side, start in zip(scaled, (top, left), strict=True))
    sample = item(*size)
    box = Crop(size, scaled, top, left, height, width)
    window = box.window().slices
    full = torch.nn.functional.interpolate(torch.from_numpy(sample.image)[None], scaled, mode="bilinear")[0].numpy()
    expected = full[:, top : top + height, left : left + width]
    np.testing.assert_allclose(box.resample_image(sample.image[:, *window]), expected, atol=2e-5)

    nearest = np.argmin(
        np.abs(np.arange(size[0])[:, None] - ((np.arange(scaled[0]) + 0.5) * size[0] / scaled[0] - 0.5)), 0
    )
    rows = nearest[top : top + height]
    label = box.resample_label(sample.label[window])
    columns = box.resample_label(np.tile(np.arange(size[1], dtype=np.uint8), (size[0], 1))[window])[0]
    exact = (
        np.abs(((np.arange(scaled[0]) + 0.5) * size[0] / scaled[0]) % 1) > 1e-9
    )  # halfway between two pixels: either
    keep = exact[top : top + height]
    assert (label[keep] == sample.label[rows[keep]][:, columns]).all()


def test_scales_fill_the_range_asked_for():
    heights = []
    for seed in range(300):
        box, _ = draw_crop((100, 100), lambda w: np.zeros((w.height, w.width), np.uint8), rng(seed), crop=8,
                           cfg=AugmentConfig())  # fmt: skip
        heights.append(box.scaled[0])
    assert min(heights) >= 50
    assert max(heights) <= 200
    assert abs(np.mean(heights) - 125) < 8


def test_a_crop_of_mostly_one_class_is_drawn_again():
    label = np.zeros((64, 64), np.uint8)
    label[:, 48:] = 1
    shares = []
    for seed in range(60):
        _, drawn = draw_crop(label.shape, lambda w: label[w.slices], rng(seed), crop=24, cfg=PLAIN)
        shares.append((drawn == 0).mean())
    assert np.mean(np.array(shares) <= 0.75) > 0.85  # expected: 0.96
    whole = [draw_crop(label.shape, lambda w: label[w.slices], rng(seed), crop=24,
                       cfg=AugmentConfig(resize=[1.0, 1.0], max_class_share=1.0))[1] for seed in range(60)]  # fmt: skip
    assert np.mean([(w == 0).mean() <= 0.75 for w in whole]) < 0.5  # expected: 0.27


def test_ignored_pixels_count_for_no_class():
    label = np.full((32, 32), 255, np.uint8)
    label[:, :2], label[:, 2:4] = 0, 1
    calls = []

    def read(window):
        calls.append(window)
        return label[window.slices]

    draw_crop(label.shape, read, rng(), crop=32, cfg=PLAIN)
    assert len(calls) == 1  # half and half of what counts


def test_a_crop_without_a_labelled_pixel_is_drawn_again():
    label = np.full((64, 64), 255, np.uint8)
    label[:, :32] = 1
    cfg = AugmentConfig(resize=[1.0, 1.0], max_class_share=1.0)
    drawn = [draw_crop(label.shape, lambda w: label[w.slices], rng(seed), crop=24, cfg=cfg)[1] for seed in range(60)]
    assert all((crop != 255).any() for crop in drawn)  # of the first draws every fifth has none
    calls = []
    empty = np.full((8, 8), 255, np.uint8)
    draw_crop((64, 64), lambda w: calls.append(w) or empty, rng(), crop=8, cfg=cfg)
    assert len(calls) == 10


def test_a_uniform_picture_ends_after_ten_draws():
    calls = []
    draw_crop((64, 64), lambda w: calls.append(w) or np.zeros((w.height, w.width), np.uint8), rng(), crop=8, cfg=PLAIN)
    assert len(calls) == 10


def test_reading_only_what_is_needed_changes_nothing():
    data = open_set(SetConfig(kind="generated", split="delta", limit=1, tile=96), name="delta")
    for seed in range(8):
        whole = augment(data.read(0), rng(seed), crop=48, cfg=AugmentConfig())
        part = augment_from(data, 0, rng(seed), crop=48, cfg=AugmentConfig())
        np.testing.assert_allclose(part[0], whole[0], atol=1e-6)
        assert (part[1] == whole[1]).all()


def pixels(image):
    return image.reshape(3, -1).T.astype(float)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.5, 1.5), seed=st.integers(0, 99))
def test_saturation_is_that_of_hsv(factor, seed):
    image = rng(seed).random((3, 4, 5), np.float32)
    image[:, 0, 0] = 0.4  # grey stays grey
    image[:, 0, 1] = 0
    for before, after in zip(pixels(image), pixels(scale_saturation(image, factor)), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        np.testing.assert_allclose(after, colorsys.hsv_to_rgb(h, min(1, s * factor), v), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(degrees=st.floats(-60, 60), seed=st.integers(0, 99))
def test_hue_is_that_of_hsv(degrees, seed):
    image = rng(seed).random((3, 4, 5), np.float32)
    image[:, 0, 0] = 0.4
    image[:, 0, 1] = (1, 0, 0.01)  # just below the seam of the circle
    for before, after in zip(pixels(image), pixels(turn_hue(image, degrees)), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        np.testing.assert_allclose(after, colorsys.hsv_to_rgb((h + degrees / 360) % 1, s, v), atol=1e-5)


def test_colours_change_but_stay_in_range_and_leave_the_input_alone():
    image = item().image
    before = image.copy()
    changed = [distort_colours(image, rng(seed)) for seed in range(40)]
    assert (image == before).all()
    assert all(c.min() >= 0 and c.max() <= 1 for c in changed)
    assert sum((c == before).all() for c in changed) < 12  # about one in sixteen
    assert any((c == before).all() for c in [distort_colours(image, rng(seed)) for seed in range(200)])


def test_bands_that_are_no_colours_keep_their_mutual_order():
    image = np.stack([np.full((4, 4), level, np.float32) for level in (0.3, 0.4, 0.5, 0.6)])
    for seed in range(30):
        flat = distort_colours(image, rng(seed))[:, 0, 0]
        assert (np.diff(flat) > 0).all()
        assert np.ptp(np.diff(flat)) < 1e-6  # one gain and one offset for all bands


def test_normalised_bands_have_their_own_mean_and_deviation():
    image = np.stack([np.full((2, 2), 0.5), np.full((2, 2), 1.0)]).astype(np.float32)
    out = normalise(image[None], (0.5, 0.25), (0.1, 0.5))
    assert out.shape == (1, 2, 2, 2)
    np.testing.assert_allclose(out[0, :, 0, 0], (0, 1.5))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_slivers_do_not_crash(size):
    for seed in range(5):
        image, label = augment(item(*size), rng(seed), crop=32, cfg=AugmentConfig())
        assert (label != 255).any()
        assert np.isfinite(image).all()
