"""The residual stream between two blocks: its last branch is added where the next norm reads the sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from cegate import ops

Pair = tuple[Tensor | None, Tensor | None]
"""Weight and bias."""


@dataclass(frozen=True)
class NormForm:
    """A normalisation over the last axis."""

    kind: str
    """layer or rms."""
    eps: float

    def __call__(self, x: Tensor, weights: Pair) -> Tensor:
        weight, bias = weights
        shape = x.shape[-1:] if weight is None else weight.shape
        if self.kind == "layer":
            return F.layer_norm(x, shape, weight, bias, self.eps)
        return F.rms_norm(x, shape, weight, self.eps)


class Stream(NamedTuple):
    """``x + scale * branch``."""

    x: Tensor
    """[B, T, C]."""
    branch: Tensor | None = None
    """[B, T, C], or nothing to add."""
    scale: Tensor | None = None
    """[C]; None: 1."""

    def total(self) -> Tensor:
        """The sum."""
        if self.branch is None:
            return self.x
        return self.x + (self.branch if self.scale is None else self.branch * self.scale)

    def normed(self, norm: NormForm, weights: Pair) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        if ops.is_fused() and norm.kind == "layer":
            return ops.residual_norm(*self, *weights, norm.eps)
        x = self.total()
        return x, norm(x, weights)
