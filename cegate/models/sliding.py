"""Sliding windows: logits of an image of any size from a model that sees squares."""

from __future__ import annotations

from collections.abc import Callable

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
        image: [1, C, H, W], normalised float32. Where it is shorter than a window it is filled up with zeros (the mean
            colour) below and to the right.
        crop: side of a window in pixels.
        stride: step between windows in pixels; default two thirds of the window.
        batch: windows per forward pass; it changes speed and memory only; default by the device and ``crop``.
        log_shares: the logits are logarithms of shares (`Head.log_shares`) and are averaged as shares. The mean of
            logarithms would let one sure window overrule all others.

    Returns:
        [1, K, H, W] in the dtype of the logits, at least float32. One window gives exactly ``forward(image)``.
    """
    height, width = image.shape[-2:]
    image = F.pad(image, (0, max(crop - width, 0), 0, max(crop - height, 0)))
    stride, batch = stride or default_stride(crop), batch or windows_at_once(image.device, crop)
    corners = [
        (top, left)
        for top in window_starts(image.shape[-2], crop, stride)
        for left in window_starts(image.shape[-1], crop, stride)
    ]
    log_shares = log_shares and len(corners) > 1
    total = count = None
    for first in range(0, len(corners), batch):
        chunk = corners[first : first + batch]
        windows = torch.cat([image[..., top : top + crop, left : left + crop] for top, left in chunk])
        logits = forward(windows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits.exp() if log_shares else logits
        if total is None:
            total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
            count = logits.new_zeros(image.shape[-2:])
        for window, (top, left) in zip(logits, chunk, strict=True):
            total[0, :, top : top + crop, left : left + crop] += window
            count[top : top + crop, left : left + crop] += 1
    mean = (total / count)[..., :height, :width]
    return mean.log() if log_shares else mean
