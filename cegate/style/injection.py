"""A training image in a style from elsewhere, in the blocks that a mask leaves open (CrossEarth, Eq. 1-5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cegate.draws import generator
from cegate.errors import ConfigError
from cegate.masks import inside
from cegate.style.networks import StyleModel
from cegate.style.statistics import Covariance, StyleStatistics

Region = Literal["masked", "kept"]


class EarthStyleInjection(nn.Module):
    """``X_S``: blocks of an image in a drawn style, the rest as it is. Nothing here learns or has a gradient.

    Each sample draws a style ``eps_o ~ N(mean, cov)`` of the collection, is given the style ``alpha eps_o + (1 - alpha)
    p_s(X)``, and shows it in some blocks. What a small picture is filled up with is neither seen nor changed. Of more
    than three bands the first three are styled; one or two are looked at as a grey or false-colour image.

    Args:
        style: what tells and gives a style.
        statistics: of the collection, in embeddings of that model.
        mean, std: per band, of pixels in 0..1, with which images are normalised.
        alpha: share of the drawn style, 0..1 (CrossEarth's training code: 0.1; style augmentation: 0.5).
        covariance: ``full``, or ``diag``, Eq. 2 taken literally.
        region: ``masked`` styles the blocks that the mask hides; ``kept`` the others, as Eq. 5 is printed.
        renormalize: normalise again after styling. Without it the whole result is left in 0..1, as CrossEarth's
            training code leaves it.
        downsample: style at 1 / 2^downsample of the size, for large crops.

    Raises:
        ConfigError: alpha out of range.
        CheckpointError: statistics of other embeddings.
    """

    def __init__(
        self,
        style: StyleModel,
        statistics: StyleStatistics,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        alpha: float = 0.1,
        covariance: Covariance = "full",
        region: Region = "masked",
        renormalize: bool = True,
        downsample: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ConfigError(
                f"style.alpha={alpha} is no share of a style; use 0 (the image's own) to 1 (the drawn one)"
            )
        statistics.check(style)
        self.style, self.alpha, self.region = style, alpha, region
        self.renormalize, self.downsample = renormalize, downsample
        self.spread = (statistics.mean, statistics.factor(covariance))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def draw(self, seed: int, iteration: int, slots: Sequence[int]) -> Tensor:
        """Styles of the collection for some slots of an iteration, [B, dim] float32 on the CPU."""
        mean, factor = self.spread
        chance = [generator(seed, "style", iteration, slot).standard_normal(len(mean)) for slot in slots]
        return torch.from_numpy(np.stack(chance) @ factor.T + mean).float()

    @torch.no_grad()
    def forward(self, images: Tensor, kept: Tensor, drawn: Tensor) -> Tensor:
        """Put styles on images.

        Args:
            images: [B, C, H, W], normalised.
            kept: [B, 1, H, W] bool, True where the block mask keeps.
            drawn: [B, dim], as :meth:`draw` gives them.

        Returns:
            [B, C, H, W] like images, which are untouched where nothing is styled; with ``renormalize=False`` in 0..1.
        """
        with torch.autocast(images.device.type, enabled=False):
            unit = (images * self.std + self.mean).clamp(0, 1)
            styled = self._restyle(unit, inside(images), drawn.to(images))
            chosen = kept.to(images.device) if self.region == "kept" else ~kept.to(images.device)
            if not self.renormalize:
                return torch.where(chosen, styled, unit)
            # not where nothing changed: normalising anew would move last digits
            return torch.where(chosen & (styled != unit), (styled - self.mean) / self.std, images)

    def _restyle(self, unit: Tensor, picture: Tensor, drawn: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0..1 wholly in their new styles; samples of equal picture size go together."""
        result = unit.clone()
        heights, widths = picture[:, 0, :, 0].sum(1).tolist(), picture[:, 0, 0].sum(1).tolist()
        sizes = list(zip(heights, widths, strict=True))
        for size in sorted(set(sizes) - {(0, 0)}):
            rows = torch.tensor([b for b, own in enumerate(sizes) if own == size], device=unit.device)
            part = unit[rows, :, : size[0], : size[1]]
            rgb, take_back = to_rgb(part)
            embedding = self.alpha * drawn[rows] + (1 - self.alpha) * self.style.embed(rgb)
            result[rows, :, : size[0], : size[1]] = take_back(self.style.restyle(rgb, embedding, self.downsample))
        return result


def to_rgb(unit: Tensor):
    """Three bands [B, 3, H, W] of images [B, C, H, W], and how such three become C bands again.

    More bands than three pass unchanged. Of one or two bands the last is repeated; the mean over its copies comes back.
    """
    bands = unit.shape[1]
    if bands >= 3:
        return unit[:, :3], lambda rgb: torch.cat([rgb, unit[:, 3:]], dim=1)
    copies = [min(channel, bands - 1) for channel in range(3)]
    last = bands - 1
    return unit[:, copies], lambda rgb: torch.cat([rgb[:, :last], rgb[:, last:].mean(1, keepdim=True)], dim=1)
