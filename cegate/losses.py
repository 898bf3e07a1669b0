"""Losses of one sample each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cegate.config import IGNORE

LEAST_SHARE = 1e-12
"""Added to a class's share of a pixel so that its logarithm, and the gradient of that, stay finite."""


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


@dataclass(frozen=True)
class PixelLoss:
    """A sum of terms, each of one sample alone. Twice the weight everywhere is twice the loss.

    ``ce``: cross entropy -log p of a pixel's true class, mean over valid pixels. ``focal``: (1 - p)^2 times it
    (arXiv:1708.02002, without its alpha). ``dice``: 1 - 2 sum(p y) / sum(p + y) of a class (arXiv:1606.04797, without
    its squares), mean over the classes of the sample's own labels, times the mean weight of its valid pixels.

    Args:
        terms: names of the terms, each once.
        class_weights: factor of a class's pixels in ce and focal, and of its dice; it does not enter what they are
            divided by, so that rare classes count more from sample to sample too. Default: all 1.
    """

    terms: tuple[str, ...] = ("ce",)
    class_weights: tuple[float, ...] | None = None

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Loss of each sample, [B]; arguments as of `pixel_cross_entropy`, 0 without a valid pixel."""
        if self == PixelLoss():
            return pixel_cross_entropy(logits, labels, weights)
        logits = at_least_float32(logits)
        # filled on the device: a CUDA graph cannot record a copy from the host
        factors = torch.stack([logits.new_full((), w) for w in self.class_weights or [1.0] * logits.shape[1]])  # [K]
        true = labels.where(labels != IGNORE, 0)
        weighed = factors[true] if weights is None else factors[true] * weights
        per_pixel = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # [B, H, W]
        found = []
        for term in self.terms:
            if term == "dice":
                found.append(dice(logits.softmax(1), labels, factors, weights))
            else:
                less_sure = (1 - (-per_pixel).exp()).square() if term == "focal" else 1
                found.append(mean_over_valid(less_sure * per_pixel * weighed, labels))
        return torch.stack(found).sum(0)


def dice(shares: Tensor, labels: Tensor, factors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Soft Dice loss of each sample, [B], see `PixelLoss`; shares [B, K, H, W] sum to 1, factors [K]."""
    valid = (labels != IGNORE).to(shares.dtype)
    weighed = valid if weights is None else valid * weights  # [B, H, W]
    truth = F.one_hot(labels.where(labels != IGNORE, 0), len(factors)).movedim(-1, 1) * weighed[:, None]
    both, area = (shares * truth).flatten(2).sum(2), truth.flatten(2).sum(2)  # [B, K]
    there = area > 0
    total = (shares * weighed[:, None]).flatten(2).sum(2) + area
    of_class = (1 - 2 * both / total.where(there, 1)).where(there, 0) * factors
    share = weighed.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)
    return of_class.sum(1) / there.sum(1).clamp(min=1) * share


def pixel_loss_of(name: str, class_weights: Sequence[float] | None = None) -> PixelLoss:
    """The loss of a configuration's ``train.loss``: terms joined by ``+``."""
    return PixelLoss(tuple(name.split("+")), None if class_weights is None else tuple(class_weights))


def mean_over_valid(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of the values [B, H, W] over the pixels of each sample whose label is not 255, [B]; 0 without any."""
    valid = labels != IGNORE
    return values.where(valid, 0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is float64."""
    return x if x.dtype.itemsize >= 4 else x.float()
