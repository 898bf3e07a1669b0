"""DFM: the features of one or two modalities as one pyramid of four scales (MFNet); and their plain sum.

Source: Ma et al., A Unified Framework with Multimodal Fine-tuning for Remote Sensing Semantic Segmentation, IEEE TGRS
2025 (arXiv:2410.11160), deep fusion module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from cegate.backbone.backbone import Features
from cegate.errors import ConfigError
from cegate.parts.part import Part

WIDTH = 256
"""Channels of SAM's neck and of the pyramid."""
REDUCTION = 16


class Neck(Part):
    """Brings the last map of every modality to the pyramid's width.

    Args:
        channels: C of the backbone's maps.
        project: frozen map [B, C, h, w] -> [B, width, h, w] of the backbone's own (SAM's neck). Default: one like it
            that learns and serves all modalities, or none where C is the width already. A function, no module: it is
            frozen, and no weight of this part.
        width: of what it gives.
        streams: modalities, which lie behind each other in the batch.
    """

    adapts = False

    def __init__(
        self,
        channels: int,
        *,
        project: Callable[[Tensor], Tensor] | None = None,
        width: int = WIDTH,
        streams: int = 2,
    ) -> None:
        super().__init__()
        self.streams, self.width = streams, width
        self.learned_projection = sam_neck(channels, width) if project is None and channels != width else None
        self._frozen_projection = project

    def project(self, deepest: Tensor) -> tuple[Tensor, ...]:
        """[S B, C, h, w] -> [B, width, h, w] of each modality."""
        project = self.learned_projection or self._frozen_projection
        return (deepest if project is None else project(deepest)).chunk(self.streams)


def sam_neck(channels: int, width: int) -> nn.Sequential:
    """The neck of SAM's image encoder."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


class DFM(Neck):
    """Two pyramids by weights of their own, fused at each scale by squeeze and excitation.

    Scales, relative to the token grid: 4 (two transposed convolutions), 2 (one), 1 (the map itself), 1/2 (maximum; an
    odd side is rounded up). With one modality the pyramid is its own, weighed by its own excitation.

    Args:
        official_norm: BatchNorm in the pyramid of the second modality, as in the published code, instead of LayerNorm
            in both.
    """

    def __init__(
        self,
        channels: int,
        *,
        project: Callable[[Tensor], Tensor] | None = None,
        width: int = WIDTH,
        streams: int = 2,
        official_norm: bool = False,
    ) -> None:
        super().__init__(channels, project=project, width=width, streams=streams)
        if width < REDUCTION:
            raise ConfigError(f"a pyramid of {width} channels is narrower than its excitation allows; use {REDUCTION}")
        self.finest, self.finer = nn.ModuleList(), nn.ModuleList()
        for stream in range(streams):
            norm = nn.BatchNorm2d(width) if official_norm and stream else LayerNorm2d(width)
            self.finest.append(nn.Sequential(_doubled(width), norm, nn.GELU(), _doubled(width)))
            self.finer.append(_doubled(width))
        self.weigh = nn.ModuleList(nn.ModuleList(SqueezeExcite(width) for _ in range(streams)) for _ in range(4))

    def pyramids(self, maps: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Maps of one scale [B, width, h, w], one a modality -> the same at each of the four scales, fine to coarse."""
        return [
            tuple(up(z) for up, z in zip(self.finest, maps, strict=True)),
            tuple(up(z) for up, z in zip(self.finer, maps, strict=True)),
            maps,
            tuple(F.max_pool2d(z, 2, ceil_mode=True) for z in maps),
        ]

    def fuse(self, level: int, maps: tuple[Tensor, ...]) -> Tensor:
        """Modalities at one scale as one map."""
        weighed = [weigh(z) for weigh, z in zip(self.weigh[level], maps, strict=True)]
        return weighed[0] if len(weighed) == 1 else weighed[0] + weighed[1]

    def forward(self, deepest: Tensor) -> list[Tensor]:
        """[S B, C, h, w] of the last layer -> [B, width, ...] at four scales, fine to coarse."""
        return [self.fuse(level, maps) for level, maps in enumerate(self.pyramids(self.project(deepest)))]

    def change(self, features: Features, images: Tensor) -> Features:
        return features._replace(maps=self(features.maps[-1]))


class StreamSum(Neck):
    """The sum of the modalities, in place of DFM: of the last map at the pyramid's width, or of every map as it is.

    Args:
        last: give the last map alone, for a decoder without skips; else all of them, for a head that takes four maps of
            the backbone's width.
    """

    def __init__(
        self,
        channels: int,
        *,
        project: Callable[[Tensor], Tensor] | None = None,
        width: int = WIDTH,
        streams: int = 2,
        last: bool = True,
    ) -> None:
        super().__init__(channels, project=project, width=width if last else channels, streams=streams)
        self.last = last

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """[S B, C, h, w] of some layers -> [B, width, h, w] of the last, or [B, C, h, w] of all."""
        if self.last:
            return [sum(self.project(maps[-1]))]
        return [sum(z.chunk(self.streams)) for z in maps]

    def change(self, features: Features, images: Tensor) -> Features:
        return features._replace(maps=self(features.maps))


class SqueezeExcite(nn.Module):
    """``z * sigmoid(up(relu(down(mean z))))``, the mean over pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // REDUCTION, 1), nn.Conv2d(width // REDUCTION, width, 1)

    def forward(self, z: Tensor) -> Tensor:
        return z * self.up(self.down(z.mean((2, 3), keepdim=True)).relu()).sigmoid()


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, 2, stride=2)
