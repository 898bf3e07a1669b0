from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cegate.models.sliding import default_stride, slide, slide_rows, window_starts, windows_at_once


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 64))
def test_windows_cover_an_axis_without_gaps_and_end_at_its_edge(length, crop, stride):
    stride = min(stride, crop)
    starts = window_starts(length, crop, stride)
    covered = {pixel for start in starts for pixel in range(start, min(start + crop, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts)) and starts[-1] == max(length - crop, 0)


def pixelwise(images):
    return torch.stack([images.sum(1), images[:, 0] - images[:, 1]], 1)


@pytest.mark.parametrize("size", [(32, 32), (40, 57), (7, 90), (5, 6)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, None])
def test_a_pixelwise_model_gives_what_it_gives_on_the_whole_image(size, batch):
    image = torch.randn(1, 3, *size)
    torch.testing.assert_close(slide(pixelwise, image, 32, 12, batch=batch), pixelwise(image))


def test_one_window_is_exactly_the_model():
    conv = torch.nn.Conv2d(3, 4, 5, padding=2)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(slide(conv, image, 32), conv(image))


def test_a_small_image_is_filled_up_with_the_mean_colour_and_cut_back():
    seen = []

    def forward(images):
        seen.append(images)
        return pixelwise(images)

    image = torch.ones(1, 3, 10, 20)
    assert slide(forward, image, 16, 8).shape == (1, 2, 10, 20)
    assert all(window.shape[-2:] == (16, 16) and not window[..., 10:, :].any() for window in seen)


def test_overlapping_windows_are_averaged():
    calls = iter(range(10))

    def forward(images):
        return torch.full((1, 1, 4, 4), float(next(calls)))

    logits = slide(forward, torch.zeros(1, 1, 4, 6), 4, 2, batch=1)[0, 0, 0]
    assert logits.tolist() == [0, 0, 0.5, 0.5, 1, 1]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 16), st.integers(1, 9), st.booleans())
def test_every_pixel_is_the_mean_of_the_windows_that_see_it(height, width, crop, stride, batch, log_shares):
    def forward(windows):  # what a pixel gets depends on its place in the window and on the whole window
        ramp = torch.arange(crop * crop, dtype=torch.float64).view(crop, crop)
        logits = torch.stack([windows.mean((1, 2, 3), keepdim=True)[:, 0] * ramp, windows[:, 0]], 1)
        return logits.log_softmax(1) if log_shares else logits

    stride = min(stride, crop)
    image = torch.randn(1, 2, height, width, dtype=torch.float64)
    padded = torch.zeros(2, max(height, crop), max(width, crop), dtype=torch.float64)
    padded[:, :height, :width] = image[0]
    total, times = torch.zeros(2, *padded.shape[1:], dtype=torch.float64), torch.zeros(padded.shape[1:])
    for top in window_starts(height, crop, stride):
        for left in window_starts(width, crop, stride):
            place = slice(top, top + crop), slice(left, left + crop)
            logits = forward(padded[None, :, *place])[0]
            total[:, *place] += logits.exp() if log_shares else logits
            times[place] += 1
    expected = (total / times).log() if log_shares else total / times
    found = slide(forward, image, crop, stride, batch=batch, log_shares=log_shares)
    torch.testing.assert_close(found[0], expected[:, :height, :width])


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_an_image_goes_through_from_top_to_bottom(batch):
    image, events = torch.randn(3, 200, 90), []

    def rows(first, last):
        events.append(("read", first, last))
        return image[:, first:last]

    parts = []
    for part, logits in slide_rows(pixelwise, rows, (200, 90), 32, 20, batch=batch):
        events.append(("done", part.start, part.stop))
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), pixelwise(image[None])[0])
    for kind in ("read", "done"):
        ends = [(first, last) for what, first, last in events if what == kind]
        assert [first for first, _ in ends] == [0, *(last for _, last in ends[:-1])] and ends[-1][1] == 200
    done = 0
    for kind, _, last in events:  # no more is held than the windows of one pass need
        done = last if kind == "done" else done
        assert last - done <= 32 + 20 * (1 + batch // 4)


def test_logarithms_of_shares_are_averaged_as_shares():
    windows = iter([torch.tensor([0.999, 0.001]), torch.tensor([0.5, 0.5])])

    def forward(images):
        return next(windows).log().view(1, 2, 1, 1).expand(1, 2, 4, 4)

    logits = slide(forward, torch.zeros(1, 1, 4, 6), 4, 2, batch=1, log_shares=True)[0, :, 0]
    torch.testing.assert_close(logits.exp()[0], torch.tensor([0.999, 0.999, 0.7495, 0.7495, 0.5, 0.5]))
    torch.testing.assert_close(logits.exp().sum(0), torch.ones(6))


def test_small_windows_run_together_and_large_ones_alone():
    device = torch.device("cpu")
    counts = [windows_at_once(device, crop) for crop in (32, 128, 512, 4096)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 8 and counts[-1] == 1
    seen = []
    slide(lambda images: seen.append(len(images)) or images, torch.zeros(1, 2, 256, 384), 128, 128)
    assert sum(seen) == 6 and max(seen) == min(6, windows_at_once(device, 128))


def test_half_precision_logits_are_added_in_float32():
    assert slide(lambda images: images.half(), torch.zeros(1, 2, 8, 8), 4).dtype == torch.float32


def test_default_stride_is_that_of_the_paper():
    assert default_stride(512) == 341
