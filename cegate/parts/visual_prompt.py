"""The visual prompt: what a masked image shows where it is hidden (CrossEarth, Eq. 6)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cegate.errors import ConfigError

Mode = Literal["fill", "add", "literal"]


class VisualPrompt(nn.Module):
    """A learned image v [1, bands, S, S] that starts at 0, the mean colour; training only.

    ``fill``: ``X M + v (1 - M)``, what the authors' training code has. ``add``: ``X M + v``. ``literal``: ``X M v``,
    Eq. 6 as printed, which is 0 at the start whatever the image.

    Args:
        bands: of the images.
        side: S, the training crop; a smaller image takes the top left part.
        mode: how v and the image meet.
    """

    deployed = False

    def __init__(self, bands: int, side: int, mode: Mode = "fill") -> None:
        super().__init__()
        self.mode = mode
        self.value = nn.Parameter(torch.zeros(1, bands, side, side))

    def no_weight_decay(self) -> set[str]:
        """v is a picture, and does not decay."""
        return {"value"}

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Masked images X_M [B, bands, H, W] of normalised ones and a mask [B, 1, H, W] bool, True where kept.

        Raises:
            ConfigError: the images are larger than the prompt.
        """
        height, width = images.shape[-2:]
        side = self.value.shape[-1]
        if height > side or width > side:
            raise ConfigError(
                f"the visual prompt is {side} px wide, the images are {height} x {width}; set data.crop so"
            )
        prompt = self.value[..., :height, :width]
        if self.mode == "fill":
            return torch.where(kept, images, prompt)
        if self.mode == "add":
            return images * kept + prompt
        return images * kept * prompt
