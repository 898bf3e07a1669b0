from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cegate.errors import ConfigError
from cegate.scenes.mosaic import BLENDS, Mosaic, Pixels, Strip, default_stride, window_starts, windows_at_once


def slide(forward, image, crop, stride=None, **options):
    """Logits [K, H, W] of a whole image [C, H, W]."""
    return torch.cat([rows.logits for rows in Mosaic(crop, stride, **options).rows(forward, Pixels(image))], 1)


def pixelwise(images):
    return torch.stack([images.sum(1), images[:, 0] - images[:, 1]], 1)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 64))
def test_windows_cover_an_axis_without_gaps_and_end_at_its_edge(length, crop, stride):
    stride = min(stride, crop)
    starts = window_starts(length, crop, stride)
    covered = {pixel for start in starts for pixel in range(start, min(start + crop, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts)) and starts[-1] == max(length - crop, 0)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", [(32, 32), (40, 57), (7, 90), (5, 6)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, None])
def test_a_pixelwise_model_gives_what_it_gives_on_the_whole_image(size, batch, blend):
    image = torch.randn(3, *size)
    expected = pixelwise(image[None])[0]
    torch.testing.assert_close(slide(pixelwise, image, 32, 12, batch=batch, blend=blend), expected)


@pytest.mark.parametrize("blend", BLENDS)
def test_one_window_is_exactly_the_model(blend):
    conv = torch.nn.Conv2d(3, 4, 5, padding=2)
    image = torch.randn(3, 32, 32)
    with torch.no_grad():
        assert torch.equal(slide(conv, image, 32, blend=blend), conv(image[None])[0])


def test_a_small_image_is_filled_up_with_the_mean_colour_and_cut_back():
    seen = []

    def forward(images):
        seen.append(images)
        return pixelwise(images)

    assert slide(forward, torch.ones(3, 10, 20), 16, 8).shape == (2, 10, 20)
    assert all(window.shape[-2:] == (16, 16) and not window[..., 10:, :].any() for window in seen)


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        ("none", [0, 0, 0.5, 0.5, 1, 1]),
        # windows of 4 px weigh their pixels 1, 3, 3, 1 and the squared sines of 22.5, 67.5, 112.5 and 157.5 degrees
        ("linear", [0, 0, 1 / 4, 3 / 4, 1, 1]),
        ("cosine", [0, 0, math.sin(math.pi / 8) ** 2, math.cos(math.pi / 8) ** 2, 1, 1]),
    ],
)
def test_overlapping_windows_are_averaged(blend, expected):
    calls = iter(range(10))

    def forward(images):
        return torch.full((1, 1, 4, 4), float(next(calls)))

    logits = slide(forward, torch.zeros(1, 4, 6), 4, 2, batch=1, blend=blend)[0, 0]
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def reference_weight(blend, length, crop, place):
    if blend == "none" or length <= crop:
        return 1.0
    middle = (place + 0.5) / crop
    return 1 - abs(2 * middle - 1) if blend == "linear" else 1e-4 + (1 - 1e-4) * math.sin(math.pi * middle) ** 2


@settings(deadline=None)  # a window per pixel takes its time
@given(
    *(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16), st.integers(1, 9)),
    *(st.booleans(), st.sampled_from(BLENDS)),
)
def test_every_pixel_is_the_weighed_mean_of_the_windows_that_see_it(h, w, crop, stride, batch, log_shares, blend):
    def forward(windows):  # what a pixel gets depends on its place in the window and on the whole window
        ramp = torch.arange(crop * crop, dtype=torch.float64).view(crop, crop) / crop
        logits = torch.stack([windows.mean((1, 2, 3), keepdim=True)[:, 0] * ramp, windows[:, 0]], 1)
        return logits.log_softmax(1) if log_shares else logits

    stride = min(stride, crop)
    image = torch.randn(2, h, w, dtype=torch.float64)
    padded = torch.zeros(2, max(h, crop), max(w, crop), dtype=torch.float64)
    padded[:, :h, :w] = image
    total, sums = torch.zeros_like(padded), torch.zeros_like(padded[0])
    weights = [[reference_weight(blend, side, crop, place) for place in range(crop)] for side in (h, w)]
    weight = torch.tensor([[of_row * of_column for of_column in weights[1]] for of_row in weights[0]]).double()
    for top in window_starts(h, crop, stride):
        for left in window_starts(w, crop, stride):
            place = slice(top, top + crop), slice(left, left + crop)
            logits = forward(padded[None, :, *place])[0]
            total[:, *place] += weight * (logits.exp() if log_shares else logits)
            sums[place] += weight
    expected = (total / sums).log() if log_shares else total / sums
    found = slide(forward, image, crop, stride, batch=batch, log_shares=log_shares, blend=blend)
    torch.testing.assert_close(found, expected[:, :h, :w], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blend", ["linear", "cosine"])
def test_a_blend_leaves_no_seam_where_a_window_ends(blend):
    """Two windows that disagree: neighbouring pixels change by little, where equal weights jump."""
    windows = iter([0.0, 1.0])

    def forward(images):
        return torch.full((1, 1, 64, 64), next(windows))

    row = slide(forward, torch.zeros(1, 64, 96), 64, 32, batch=1, blend=blend)[0, 0]
    assert row.diff().max() < 0.06 and row.diff().min() > -1e-6 and row[0] == 0 and row[-1] == 1


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_an_image_goes_through_from_top_to_bottom(batch):
    image, empty, events = torch.randn(3, 200, 90), np.random.default_rng(0).random((200, 90)) < 0.2, []

    class Source:
        size = (200, 90)

        def read(self, first, last):
            events.append(("read", first, last))
            return Strip(image[:, first:last], empty[first:last])

    parts, gaps = [], []
    for rows in Mosaic(32, 20, batch=batch).rows(pixelwise, Source()):
        events.append(("done", rows.place.start, rows.place.stop))
        parts.append(rows.logits)
        gaps.append(rows.empty)
    torch.testing.assert_close(torch.cat(parts, 1), pixelwise(image[None])[0])
    np.testing.assert_array_equal(np.concatenate(gaps), empty)
    for kind in ("read", "done"):
        ends = [(first, last) for what, first, last in events if what == kind]
        assert [first for first, _ in ends] == [0, *(last for _, last in ends[:-1])] and ends[-1][1] == 200
    done = 0
    for (
        kind,
        _,
        last,
    ) in events:  # no more is held than the windows of one pass need, and what is read ahead for the next
        done = last if kind == "done" else done
        assert last - done <= 32 + 2 * 20 * (1 + batch // 4)


def test_logarithms_of_shares_are_averaged_as_shares():
    windows = iter([torch.tensor([0.999, 0.001]), torch.tensor([0.5, 0.5])])

    def forward(images):
        return next(windows).log().view(1, 2, 1, 1).expand(1, 2, 4, 4)

    logits = slide(forward, torch.zeros(1, 4, 6), 4, 2, batch=1, log_shares=True)[:, 0]
    torch.testing.assert_close(logits.exp()[0], torch.tensor([0.999, 0.999, 0.7495, 0.7495, 0.5, 0.5]))
    torch.testing.assert_close(logits.exp().sum(0), torch.ones(6))


@pytest.mark.parametrize("size", [(90, 61), (33, 200), (200, 33)], ids=str)
def test_a_fitted_image_is_shrunk_and_its_logits_enlarged(size):
    image, empty = torch.randn(3, *size), np.random.default_rng(0).random(size) < 0.2

    class Source(Pixels):
        def read(self, first, last):
            return Strip(self.image[:, first:last], empty[first:last])

    sides = [round(side * 30 / max(size)) for side in size]
    small = F.interpolate(image[None], sides, mode="bilinear", antialias=True)[0]
    expected = F.interpolate(slide(pixelwise, small, 16)[None], size, mode="bilinear")[0]
    rows = list(Mosaic(16, fit=30).rows(pixelwise, Source(image)))
    torch.testing.assert_close(torch.cat([part.logits for part in rows], 1), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([part.empty for part in rows]), empty)
    assert max(part.logits.shape[1] for part in rows) == 16
    assert torch.equal(slide(pixelwise, image, 16, fit=200), slide(pixelwise, image, 16)), "it fits as it is"


def test_small_windows_run_together_and_large_ones_alone():
    device = torch.device("cpu")
    counts = [windows_at_once(device, crop) for crop in (32, 128, 512, 4096)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 8 and counts[-1] == 1
    seen = []
    slide(lambda images: seen.append(len(images)) or images, torch.zeros(2, 256, 384), 128, 128)
    assert sum(seen) == 6 and max(seen) == min(6, windows_at_once(device, 128))


@pytest.mark.parametrize("blend", BLENDS)
def test_half_precision_logits_are_added_in_float32(blend):
    assert slide(lambda images: images.half(), torch.zeros(2, 8, 8), 4, blend=blend).dtype == torch.float32


def test_default_stride_is_that_of_the_paper():
    assert default_stride(512) == 341


def test_what_leaves_gaps_or_has_no_name_is_refused():
    with pytest.raises(ConfigError, match=r"stride=33 does not fit windows of 32 px; use 1\.\.32"):
        Mosaic(32, 33)
    for stride in (0, -1, 1.5, "8", True, 2**70):
        with pytest.raises(ConfigError, match=f"stride={stride} does not fit windows of 32 px"):
            Mosaic(32, stride)
    assert Mosaic(32, np.int64(8)).stride == 8
    with pytest.raises(ConfigError, match="blend=None is unknown"):
        Mosaic(32, blend=None)
    with pytest.raises(ConfigError, match=r"blend=cosin is unknown; use none, linear or cosine; did you mean 'cosine'"):
        Mosaic(32, blend="cosin")
