"""Block masks: squares of an image that are kept or hidden at random (MIC, CVPR 2023; CrossEarth, Eq. 3-4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cegate.draws import generator
from cegate.errors import ConfigError


@dataclass(frozen=True)
class BlockMask:
    """Hides each ``block`` x ``block`` square with probability ``ratio``.

    Drawn on the CPU by NumPy, so that a mask is the same on every device.

    Args:
        ratio: expected share tau of hidden blocks, 0..1.
        block: side b in pixels.
        crop: side of the images, where it is known; a block is no larger.
        section: of the configuration, for messages: ``style`` or ``mim``.

    Raises:
        ConfigError: ratio or block is out of range; both problems at once.
    """

    ratio: float
    block: int
    crop: int | None = None
    section: str = "mim"

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.ratio <= 1:
            problems.append(f"{self.section}.ratio={self.ratio} is no share of blocks; use 0 (none) to 1 (all)")
        if self.block < 1:
            problems.append(f"{self.section}.block={self.block} is no side in pixels; use 1 or more")
        elif self.crop is not None and self.block > self.crop:
            problems.append(
                f"{self.section}.block={self.block} is larger than the crop, data.crop={self.crop}; use {self.crop} or "
                "less"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    def draw(self, size: tuple[int, int], seed: int, iteration: int, slots: Sequence[int]) -> Tensor:
        """Masks of the samples in some slots of an iteration; a slot's does not depend on the others.

        Args:
            size: (H, W) in pixels; the last row and column of blocks are cut where it is no multiple of the block.

        Returns:
            [B, 1, H, W] bool on the CPU, True where the image is kept.
        """
        cells = [-(-side // self.block) for side in size]
        purpose = f"{self.section} mask"
        # U >= ratio in place of U > ratio: the same distribution, and nothing is hidden at 0 nor kept at 1
        kept = [generator(seed, purpose, iteration, slot).random(cells) >= self.ratio for slot in slots]
        blocks = np.stack(kept).repeat(self.block, axis=1).repeat(self.block, axis=2)
        return torch.from_numpy(blocks[:, None, : size[0], : size[1]].copy())


def inside(images: Tensor) -> Tensor:
    """Where crops show their picture, and not what small pictures are filled up with.

    A stream fills up below and to the right with exactly 0 in every band. So the last rows and columns that are 0
    throughout are no picture; of a crop without one nothing is.

    Args:
        images: [B, C, H, W], normalised.

    Returns:
        [B, 1, H, W] bool.
    """
    drawn = (images != 0).any(1)  # [B, H, W]
    return (_up_to_last(drawn.any(2))[:, :, None] & _up_to_last(drawn.any(1))[:, None, :])[:, None]


def _up_to_last(drawn: Tensor) -> Tensor:
    """[B, N] bool -> True up to the last True of each row."""
    return drawn.flip(1).to(torch.uint8).cummax(1).values.flip(1).bool()
