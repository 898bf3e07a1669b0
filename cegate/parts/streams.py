"""How the rasters of a sample become streams: modalities behind each other in the batch, and what is not known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cegate.errors import ConfigError
from cegate.parts.part import Part


class Streams(Part):
    """[B, bands, H, W] with the bands of all modalities -> [S B, C, H, W] as a backbone of C bands takes them.

    NaN is what is not known: a hole in an elevation map, or a raster that a sample lacks. It becomes a learned value of
    its band, which starts as 0; so a hole is no height, and a model that was trained with missing modalities
    (`lose_modality`) serves with and without them.

    A modality of one band is repeated to C bands. One of fewer bands than C is followed by their mean.

    Args:
        names: of the modalities.
        bands: how many each has.
        channels: C.

    Raises:
        ConfigError: a modality has more bands than the backbone takes.
    """

    def __init__(self, names: Sequence[str], bands: Sequence[int], channels: int = 3) -> None:
        super().__init__()
        self.names, self.bands, self.channels = tuple(names), tuple(bands), channels
        self.further = sum(bands[1:])
        for name, count in zip(names, bands, strict=True):
            if not 1 <= count <= channels:
                raise ConfigError(
                    f"modality {name} has {count} bands and the backbone takes 1 to {channels}; choose some by bands"
                )
        self.absent = nn.Parameter(torch.zeros(sum(bands)))

    adapts = False

    def enter(self, images: Tensor) -> Tensor:
        return self(images)

    def forward(self, images: Tensor) -> Tensor:
        known = torch.where(images.isnan(), self.absent[:, None, None].to(images.dtype), images)
        return torch.cat([self._filled(part) for part in known.split(self.bands, dim=1)])

    def _filled(self, part: Tensor) -> Tensor:
        lacking = self.channels - part.shape[1]
        return torch.cat([part, part.mean(1, keepdim=True).expand(-1, lacking, -1, -1)], 1) if lacking else part


def choose_lost(uniform: Tensor, probability: float, streams: int = 2) -> Tensor:
    """Which modality a sample loses: -1 for none.

    Args:
        uniform: [B] drawn from 0..1, as a function of seed, iteration and slot.
        probability: of losing one; each is as likely as the others, and never are all lost.

    Returns:
        [B] int64.
    """
    lost = (uniform / max(probability, 1e-12) * streams).long()
    return torch.where(uniform < probability, lost.clamp(max=streams - 1), -1)


def lose_modality(images: Tensor, bands: Sequence[int], lost: Tensor) -> Tensor:
    """Images [B, bands, H, W] in which sample b does not know modality ``lost[b]`` (-1: knows all), as NaN."""
    owner = torch.arange(len(bands), device=images.device).repeat_interleave(
        torch.tensor(bands, device=images.device), output_size=sum(bands)
    )
    return images.masked_fill((owner == lost.to(images.device)[:, None])[..., None, None], torch.nan)
