"""The geospatial semantic extractor: a small convolutional net whose maps ask the backbone's features what they know
(CrossEarth, section 3.2; kernel sizes and widths are not published)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cegate.resize import resize

SHARES = (16, 8, 4, 2)
"""The backbone's width over the channels after each of the first four convolutions: 64 to 512 of a ViT-L. On a small
backbone fixed widths would cost more than the backbone."""


class GSE(nn.Module):
    """Five 3 x 3 convolutions with ReLU, the first four of stride 2: images [B, bands, H, W] -> queries [B, h w, C].

    Args:
        bands: of the images, which are those that the backbone sees.
        channels: C, the backbone's width.
        widths: channels after each but the last convolution, stride 2 for each; default C / 16, C / 8, C / 4, C / 2.
    """

    deployed = True

    def __init__(self, bands: int, channels: int, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        widths = widths or [max(channels // share, 1) for share in SHARES]
        strided = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise([bands, *widths])]
        self.layers = nn.ModuleList([*strided, nn.Conv2d(widths[-1], channels, 3, padding=1)])

    def no_weight_decay(self) -> set[str]:
        """Every kernel decays."""
        return set()

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries on the token grid, [B, h w, C], row by row; resized bilinearly where tokens are not of 16 px."""
        x = images
        for layer in self.layers:
            x = layer(x).relu()
        return resize(x, grid).flatten(2).mT
