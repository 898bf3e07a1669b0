"""Pixels to 0..1: ranges are met, what is meant for another range is refused."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cegate.data.scale import check_depth, check_scale, to_unit
from cegate.errors import DataError


@given(
    image=hnp.arrays(np.float32, (2, 3, 4), elements={"min_value": -1e4, "max_value": 1e4}),
    low=st.integers(-500, 500),
    span=st.integers(1, 1000),
)
def test_scaling_maps_the_range_to_0_and_1_and_clips(image, low, span):
    unit, empty = to_unit(image, [(low, low + span)] * 2)
    assert unit.dtype == np.float32
    assert not empty.any()
    np.testing.assert_allclose(unit, np.clip((image.astype(float) - low) / span, 0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "top", "wanted", "fits"),
    [
        ("float32", 0.9, 2500, False),
        ("float32", 0.0, 2500, True),  # a tile without data
        ("float32", 1800, 2500, True),
        ("float32", 1.9, 2.3, True),  # radar, indices
        ("float32", 1.0, 5, True),
        ("uint16", 2, 2500, True),  # deep shadow, in the same numbers
        ("uint8", 200, 0.6, False),
        ("uint16", 3000, 0.6, False),
        ("float32", 1.3, 0.6, True),
    ],
)
def test_reflectances_are_not_taken_for_digital_numbers(dtype, top, wanted, fits):
    pixels = (np.linspace(0.2, 1, 3 * 20 * 20).reshape(3, 20, 20) * top).astype(dtype)
    if dtype == "float32":
        pixels[:, 3, 4] = np.nan
    expected = (
        nullcontext() if fits else pytest.raises(DataError, match=f"tile: pixels of {dtype} up to .* up to {wanted}")
    )
    with expected:
        check_scale(pixels, [(0.0, wanted)] * 3, "tile", "scale it")


def test_a_scale_is_refused_only_where_every_band_says_so():
    reflectance = np.full((3, 8, 8), 0.2, np.float32)
    check_scale(reflectance, [(100, 2500), (100, 2500), (0, 1)], "tile", "scale it")  # two bands, and an index
    nearly_empty = np.zeros((3, 8, 8), np.float32)
    nearly_empty[:, 0, 0] = 1
    check_scale(nearly_empty, [(100, 2500)] * 3, "tile", "scale it")
    without_data = np.full((3, 8, 8), 1e20, np.float32)
    without_data[:, :2] = 0.3
    check_scale(without_data, [(0, 0.6)] * 3, "tile", "scale it")


def test_a_constant_band_becomes_0():
    assert (to_unit(np.full((1, 2, 2), 7, np.uint16), [(7, 7)])[0] == 0).all()


def test_a_pixel_without_a_value_in_one_band_is_0_in_all():
    image = np.full((2, 3, 4), 5, np.float32)
    image[0, 1, 2], image[1, 0, 0] = np.nan, -np.inf
    unit, empty = to_unit(image, [(0, 10)] * 2)
    assert np.argwhere(empty).tolist() == [[0, 0], [1, 2]]
    np.testing.assert_array_equal(unit, np.where(empty, 0, np.float32(0.5))[None].repeat(2, 0))


@pytest.mark.parametrize(
    ("dtype", "high", "fits"),
    [
        ("uint8", 255, True),
        ("uint16", 255, False),
        ("float32", 255, False),
        ("uint8", 240, True),  # percentiles of 8-bit pixels
        ("uint8", 0.6, False),
        ("uint8", 2500, False),
        ("uint16", 2500, True),
        ("complex_int16", 255, False),  # GDAL knows it, numpy does not
    ],
)
def test_pixels_of_another_depth_than_the_range_is_for_are_refused(dtype, high, fits):
    learned = "8-bit pixels" if high == 255 else f"pixels of up to {high}"
    refused = pytest.raises(DataError, match=f"tile: pixels are {dtype}, but the model learns from {learned}; scale it")
    with nullcontext() if fits else refused:
        check_depth(dtype, [(0.0, high)] * 3, "tile", "scale it")
