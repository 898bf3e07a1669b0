"""Decoders that restore an image from the features of a masked one; used in training only (CrossEarth, Eq. 8-9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.errors import ConfigError, nearest
from cegate.resize import resize

DILATIONS = (1, 6, 12, 18)
SHARE = 4
"""The backbone's width over that of a decoder: 256 for a ViT-L, as in the authors' code."""
DecoderName = Literal["per_level", "full_aspp", "linear"]


class Restore(nn.Module):
    """Four maps [B, C, h, w] on the token grid -> an image [B, bands, *size].

    Args:
        channels: C.
        bands: of the image.
    """

    deployed = False

    def no_weight_decay(self) -> set[str]:
        """Every kernel decays."""
        return set()


class PerLevel(Restore):
    """Level i through a 3 x 3 convolution of dilation 1, 6, 12 or 18, all side by side, one linear map to pixels.

    Tokens are normalised over their channels. On the token grid and not on the resized pyramid, on whose smallest level
    a dilation of 18 would reach past the border.
    """

    def __init__(self, channels: int, bands: int, width: int | None = None) -> None:
        super().__init__()
        width = width or max(channels // SHARE, 1)
        self.levels = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=d, dilation=d) for d in DILATIONS])
        self.linear = nn.Conv2d(len(DILATIONS) * width, bands, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        seen = [level(_even(features)).relu() for level, features in zip(self.levels, maps, strict=True)]
        return resize(self.linear(torch.cat(seen, dim=1)), size)


class FullAspp(Restore):
    """One dilated pyramid shared by the four maps at 4, 2, 1 and 1/2 times the token grid, as in the authors' code.

    What follows is linear until the next ReLU, so it runs before the maps are enlarged: the same numbers, and no
    [B, 1024, H, W].
    """

    def __init__(self, channels: int, bands: int, width: int | None = None) -> None:
        super().__init__()
        width = width or max(channels // SHARE, 1)
        self.reduce = nn.Conv2d(channels, width, 1)
        self.branches = nn.ModuleList([nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in DILATIONS])
        self.project = nn.Conv2d(len(DILATIONS) * width, width, 1)
        self.merge = nn.Conv2d(4 * width, width, 1)
        self.linear = nn.Conv2d(width, bands, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        h, w = maps[0].shape[-2:]
        grids = (4 * h, 4 * w), (2 * h, 2 * w), (h, w), ((h + 1) // 2, (w + 1) // 2)
        parts = self.merge.weight.chunk(4, dim=1)
        merged = sum(
            resize(F.conv2d(self.pyramid(resize(features, grid)), part), size)
            for features, grid, part in zip(maps, grids, parts, strict=True)
        )
        return self.linear((merged + self.merge.bias[:, None, None]).relu())

    def pyramid(self, features: Tensor) -> Tensor:
        """One level [B, C, h, w] -> [B, width, h, w]."""
        reduced = self.reduce(features)
        return self.project(torch.cat([branch(reduced) for branch in self.branches], dim=1)).relu()


class Linear(Restore):
    """One linear map of the four levels side by side: the ablation without dilated convolutions."""

    def __init__(self, channels: int, bands: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(4 * channels, bands, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return resize(self.linear(torch.cat([_even(features) for features in maps], dim=1)), size)


DECODERS: dict[str, Callable[[int, int], Restore]] = {"per_level": PerLevel, "full_aspp": FullAspp, "linear": Linear}


def build_decoder(name: str, channels: int, bands: int) -> Restore:
    """A decoder by its name in the configuration.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in DECODERS:
        raise ConfigError(f"mim.decoder={name!r} is not one of {', '.join(DECODERS)}{nearest(name, DECODERS)}")
    return DECODERS[name](channels, bands)


def _even(features: Tensor) -> Tensor:
    """Each token's channels at mean 0 and deviation 1, without weights of its own.

    Tokens before the last norm are large: without this the first steps of an optimiser throw the image far off, and its
    running moments remember that for a thousand iterations.
    """
    return F.layer_norm(features.movedim(1, -1), (features.shape[1],)).movedim(-1, 1)
