"""Losses of one sample each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cegate.config import IGNORE


def pixel_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the valid pixels of each sample, in nats.

    Args:
        logits: [B, K, H, W], floating point. Half precision is computed in float32, float64 stays.
        labels: [B, H, W] int64, 0..K-1, or 255 where a pixel does not count.
        weights: [B, H, W] factor of each pixel's cross entropy; default: 1.

    Returns:
        [B], float32 or float64. Reduction is the mean within a sample and none across samples, so an entry depends on
        its own sample only. A sample without a valid pixel has loss 0 and gradient 0.
    """
    per_pixel = F.cross_entropy(at_least_float32(logits), labels, ignore_index=IGNORE, reduction="none")  # [B, H, W]
    return mean_over_valid(per_pixel if weights is None else per_pixel * weights, labels)


def mean_over_valid(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of the values [B, H, W] over the pixels of each sample whose label is not 255, [B]; 0 without any."""
    valid = labels != IGNORE
    return values.where(valid, 0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is float64."""
    return x if x.dtype.itemsize >= 4 else x.float()
