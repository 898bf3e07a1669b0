"""Plain resampling of a ViT's two embeddings, as Rein, CrossEarth and Earth-Adapter convert DINOv2.

Bicubic, half-pixel centres, no antialiasing, no rescaling of the kernel. timm's own (a pseudo-inverse for the patch
kernel, antialiased positions) gives other tokens: heads and adapters fit the one that they were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, POSITIONS = "patch_embed.proj.weight", "pos_embed"


def resample_patch(kernel: Tensor, side: int) -> Tensor:
    """Patch kernel [C, bands, p, p] -> [C, bands, side, side]."""
    return _bicubic(kernel, (side, side))


def resample_positions(positions: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Positions [1, prefix + n n, C] of a square grid -> [1, prefix + h w, C]; prefix positions are kept."""
    return _resampled(positions, prefix, lambda planes: _bicubic(planes, grid))


def published_positions(positions: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Positions as the published backbones resize them in a forward pass on another grid than their own.

    They resize by the factors (n + 0.1) / own side, a guard against rounding that also moves the sampling points: it is
    no resize to a size.
    """
    side = int((positions.shape[1] - prefix) ** 0.5)
    factors = [(n + 0.1) / side for n in grid]
    return _resampled(
        positions,
        prefix,
        lambda planes: F.interpolate(planes, scale_factor=factors, mode="bicubic", align_corners=False),
    )


def resample_plain(state: Mapping[str, Tensor], *, patch: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Weights of a ViT by name with both embeddings resampled where their size is another; the rest is as it was.

    Args:
        state: ``patch_embed.proj.weight`` [C, bands, p, p] and ``pos_embed`` [1, prefix + n n, C], among others.
        patch: patch side p that is wanted, in pixels.
        grid: (h, w) in patches that is wanted.
    """
    changed = dict(state)
    if PATCH in state and state[PATCH].shape[-1] != patch:
        changed[PATCH] = resample_patch(state[PATCH], patch)
    if POSITIONS in state:
        count = state[POSITIONS].shape[1]
        prefix = count - math.isqrt(count) ** 2  # class and register tokens, far fewer than a further row would take
        if count != prefix + grid[0] * grid[1]:
            changed[POSITIONS] = resample_positions(state[POSITIONS], grid, prefix)
    return changed


def _resampled(positions: Tensor, prefix: int, resize: Callable[[Tensor], Tensor]) -> Tensor:
    kept, patches = positions[:, :prefix], positions[:, prefix:]
    side = int(patches.shape[1] ** 0.5)
    planes = patches.mT.unflatten(2, (side, side))
    return torch.cat([kept, resize(planes).flatten(2).mT], dim=1)


def _bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)
