from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from cegate.data.climates import BUILDING, CLASSES, CLIMATES, FOREST, PALETTE, PRETRAINING, ROAD, WATER
from cegate.data.scenes import render_scene
from cegate.errors import ConfigError, DataError


@pytest.mark.parametrize("climate", CLIMATES)
def test_a_scene_is_a_function_of_climate_number_and_size(climate):
    image, label = render_scene(climate, 3, 96)
    again, same = render_scene(climate, 3, 96)
    assert image.dtype == label.dtype == np.uint8
    assert image.shape == (3, 96, 96)
    assert label.shape == (96, 96)
    assert (image == again).all()
    assert (label == same).all()
    assert (render_scene(climate, 4, 96)[0] != image).any()


@pytest.mark.parametrize("climate", CLIMATES)
def test_every_class_occurs_but_none_covers_all(climate):
    labels = np.stack([render_scene(climate, number)[1] for number in range(10)])
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert len(share) == len(CLASSES)
    assert share.min() > 0.01
    assert share.max() < 0.85


@pytest.mark.parametrize("size", [16, 17, 333])
def test_any_size_can_be_drawn(size):
    image, label = render_scene("delta", 0, size)
    assert image.shape == (3, size, size)
    assert label.max() < len(CLASSES)


def test_the_look_can_change_while_the_place_stays():
    hazy = dataclasses.replace(CLIMATES["temperate"], haze=0.4, noise=0.0)
    assert (render_scene(hazy, 0)[1] == render_scene("temperate", 0)[1]).all()
    assert (render_scene(hazy, 0)[0] != render_scene("temperate", 0)[0]).any()


def test_pretraining_climates_are_neither_sources_nor_targets():
    assert len(PRETRAINING) >= 6
    assert not {"temperate", "arid", "tropical"} & set(PRETRAINING)
    looks = [dataclasses.replace(climate, name="", group="domain") for climate in CLIMATES.values()]
    assert all(a != b for a, b in combinations(looks, 2))


def _class_means(climate, scenes=8):
    pairs = [render_scene(climate, number) for number in range(scenes)]
    image = np.concatenate([i.reshape(3, -1) for i, _ in pairs], axis=1)
    label = np.concatenate([lab.ravel() for _, lab in pairs])
    return np.stack([image[:, label == k].mean(1) for k in range(len(CLASSES))]), image, label


def _accuracy(means, image, label):
    sample = slice(None, None, 17)
    distance = ((image[:, sample, None] - means.T[:, None]) ** 2).sum(0)
    hit = distance.argmin(1) == label[sample]
    return np.mean([hit[label[sample] == k].mean() for k in range(len(CLASSES))])  # mean over classes


def test_colours_learned_in_one_climate_mislead_in_another():
    means, image, label = _class_means("temperate")
    at_home = _accuracy(means, image, label)
    for climate in ("arid", "tropical"):
        own, image, label = _class_means(climate)
        assert _accuracy(means, image, label) < at_home - 0.1
        assert _accuracy(own, image, label) > _accuracy(means, image, label) + 0.1  # the scene itself can be solved


def test_water_and_woods_look_unlike_roofs_and_roads():
    for climate in CLIMATES:
        means, _, _ = _class_means(climate, scenes=3)
        for one in (FOREST, WATER):
            for other in (BUILDING, ROAD):
                assert np.abs(means[one] - means[other]).max() > 8, (climate, CLASSES[one], CLASSES[other])


# Severe colour deficiency in linear RGB: Machado, Oliveira and Fernandes, IEEE TVCG 15(6), 2009, table 1.
_DEFICIENCY = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def _lab(rgb):
    xyz = rgb @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(np.maximum(xyz / (0.9505, 1, 1.089), 0.008856))
    return np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), axis=1)


@pytest.mark.parametrize("eye", _DEFICIENCY)
def test_the_palette_is_told_apart_with_any_colour_vision(eye):
    srgb = np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in PALETTE]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = _lab(np.clip(linear @ np.array(_DEFICIENCY[eye]).T, 0, 1))
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15  # CIE76; 2.3 is just noticeable


def test_an_unknown_climate_is_named_with_its_nearest():
    with pytest.raises(ConfigError, match=r"'tropicl'.*temperate.*did you mean 'tropical'"):
        render_scene("tropicl", 0)


@pytest.mark.parametrize(("number", "size"), [(-1, 64), (0, 8)])
def test_numbers_out_of_range_are_refused(number, size):
    with pytest.raises(DataError, match=f"number={number}, size_px={size}"):
        render_scene("arid", number, size)
