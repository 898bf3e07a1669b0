"""Sliding windows: logits of an image of any size from a model that sees squares.

An image goes through from top to bottom, so that a scene need not fit in memory: a row of it is done once no window
that is still to come covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS_ON_GPU, PIXELS_ON_CPU = 8 * 512**2, 8 * 128**2
"""Of the windows that run together: small ones alone leave a device idle between operators, large ones fill it."""


def windows_at_once(device: torch.device, crop: int) -> int:
    """Windows of ``crop`` px that keep a device busy; more only costs memory."""
    return max(1, (PIXELS_ON_CPU if device.type == "cpu" else PIXELS_ON_GPU) // crop**2)


def default_stride(crop: int) -> int:
    """Two thirds of the window, as CrossEarth-Gate tests: 341 px for 512."""
    return max(1, crop * 2 // 3)


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of windows that cover an axis; the last one ends at the edge."""
    return [*range(0, max(length - crop, 0), stride), max(length - crop, 0)]


def slide(
    forward: Callable[[Tensor], Tensor],
    image: Tensor,
    crop: int,
    stride: int | None = None,
    *,
    batch: int | None = None,
    log_shares: bool = False,
) -> Tensor:
    """Logits of a whole image, averaged where windows overlap.

    Args:
        forward: normalised images [B, C, crop, crop] -> logits [B, K, crop, crop].
        image: [1, C, H, W], normalised float32.
        crop, stride, batch, log_shares: as in `slide_rows`.

    Returns:
        [1, K, H, W] in the dtype of the logits, at least float32. One window gives exactly ``forward(image)``.
    """
    rows, size = lambda first, last: image[0, :, first:last], tuple(image.shape[-2:])
    options = {"batch": batch, "log_shares": log_shares}
    return torch.cat([part for _, part in slide_rows(forward, rows, size, crop, stride, **options)], dim=1)[None]


def slide_rows(
    forward: Callable[[Tensor], Tensor],
    rows: Callable[[int, int], Tensor],
    size: tuple[int, int],
    crop: int,
    stride: int | None = None,
    *,
    batch: int | None = None,
    log_shares: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of an image from top to bottom, averaged where windows overlap; a few windows' height of it is held.

    Args:
        forward: normalised images [B, C, crop, crop] -> logits [B, K, crop, crop].
        rows: ``rows(first, last)`` gives rows [C, last - first, W] of the image, normalised float32; each is asked for
            once, in order.
        size: (H, W) of the image. Where it is shorter than a window it is filled up with zeros (the mean colour) below
            and to the right.
        crop: side of a window in pixels.
        stride: step between windows in pixels; default two thirds of the window.
        batch: windows per forward pass; it changes speed and memory only; default by the device and ``crop``.
        log_shares: the logits are logarithms of shares (`Head.log_shares`) and are averaged as shares. The mean of
            logarithms would let one sure window overrule all others.

    Yields:
        Rows of the image and their logits [K, rows, W], at least float32, as they are done.
    """
    height, width = size
    stride = stride or default_stride(crop)
    tops, lefts = window_starts(height, crop, stride), window_starts(width, crop, stride)
    corners = [(top, left) for top in tops for left in lefts]
    log_shares = log_shares and len(corners) > 1
    below, right = max(crop - height, 0), max(crop - width, 0)

    def read(first: int, last: int) -> Tensor:
        part = rows(first, min(last, height))
        return F.pad(part, (0, right, 0, below)) if below or right else part

    image, image_top = read(0, crop), 0
    batch = batch or windows_at_once(image.device, crop)
    row_counts, column_counts = (_counts(starts, crop, image.device) for starts in (tops, lefts))
    sums, done = None, 0  # of the rows from `done` on
    for first in range(0, len(corners), batch):
        chunk = corners[first : first + batch]
        top, bottom = chunk[0][0], chunk[-1][0] + crop
        if (held := image_top + image.shape[1]) < bottom:
            image, image_top = torch.cat((image[:, top - image_top :], read(held, bottom)), dim=1), top
        logits = forward(torch.stack([_window(image, y - image_top, x, crop) for y, x in chunk]))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits.exp() if log_shares else logits
        sums = logits.new_zeros(logits.shape[1], 0, image.shape[2]) if sums is None else sums
        if missing := bottom - done - sums.shape[1]:
            sums = F.pad(sums, (0, 0, 0, missing))
        for window, (y, x) in zip(logits, chunk, strict=True):
            _window(sums, y - done, x, crop).add_(window)
        reached = corners[first + batch][0] if first + batch < len(corners) else bottom
        if reached > done:
            mean = sums[:, : reached - done] / (row_counts[done:reached, None] * column_counts)
            mean = mean[:, : height - done, :width]
            yield slice(done, done + mean.shape[1]), mean.log() if log_shares else mean
            sums, done = sums[:, reached - done :], reached


def _window(pixels: Tensor, top: int, left: int, crop: int) -> Tensor:
    return pixels[:, top : top + crop, left : left + crop]


def _counts(starts: Sequence[int], crop: int, device: torch.device) -> Tensor:
    """How many windows each pixel of an axis lies in."""
    counts = torch.zeros(starts[-1] + crop)
    for start in starts:
        counts[start : start + crop] += 1
    return counts.to(device)
