"""What every site has in common, and how Fisher scoring looks inside one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate import ops
from cegate.config import Kind


@dataclass
class TokenLayout:
    """How the tokens of the current forward pass lie: prefix tokens first, then the grid row by row."""

    prefix: int
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Share:
    """What a site does in a call whose samples differ."""

    adapters: Sequence[int] | None = None
    """Adapter of each sample, or -1 where the site is off, as in :mod:`cegate.ops`; None: all samples alike."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights in place of the site's own, [A, ...] where ``adapters`` index them; empty: the site's own."""


Add = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]
Unpack = Callable[[Tensor], Mapping[str, Tensor]]


class Tap(Protocol):
    """Hears of every weight's gradient, sample by sample, during one backward pass."""

    def linear(self, site: str, unpack: Unpack, inputs: Tensor, grads: Tensor) -> None:
        """Sample b's gradient of a weight [out, in] is ``grads[b]^T inputs[b]``.

        Args:
            unpack: splits something of the weight's shape into the site's parameters.
            inputs: [B, T, in].
            grads: [B, T, out].
        """

    def direct(self, site: str, name: str, grads: Tensor) -> None:
        """Sample b's gradient of a parameter is ``grads[b]``; grads are [B, *parameter.shape]."""


class _Observed(torch.autograd.Function):
    """``add(x, base)`` with a backward pass that forms each sample's weight gradients and keeps x alone until then."""

    @staticmethod
    def forward(ctx, anchor: Tensor, x: Tensor, base: Tensor, add: Add, backward: Backward) -> Tensor:
        ctx.run, ctx.dtype = backward, ops.compute_dtype(x)
        ctx.save_for_backward(x)
        y = add(x, base)
        if y.data_ptr() == base.data_ptr():
            ctx.mark_dirty(base)
            return base
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx = ctx.run(x.to(ctx.dtype), dy.to(ctx.dtype))
        return None, dx.to(x.dtype), dy, None, None


class Site(nn.Module):
    """One module kind at one layer.

    Subclasses add their delta through hooks on a timm block. While ``tap`` is set, they run their own backward pass,
    which shows it every weight's gradient sample by sample. While ``share`` is set, they run on its samples with its
    weights.
    """

    kind: ClassVar[Kind]
    tap: Tap | None = None
    share: Share = Share()

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @property
    def name(self) -> str:
        """``<kind>.<layer>``."""
        return f"{self.kind}.{self.layer}"

    def attach(self, block: nn.Module, tokens: TokenLayout) -> list[RemovableHandle]:
        """Hook into a block; removing the handles leaves no trace."""
        raise TypeError(f"{type(self).__name__} is no kind of module")

    def run(self, x: Tensor, base: Tensor, add: Add, backward: Backward) -> Tensor:
        """``add(x, base)``, which is base plus a function of x.

        While a tap listens, ``backward(x, dy) -> dx`` differentiates that function and tells the tap the gradients.
        """
        if self.tap is None:
            return add(x, base)
        anchor = torch.ones((), device=x.device, requires_grad=True)  # below the first site x itself needs no gradient
        return _Observed.apply(anchor, x, base, add, backward)

    def operands(self, *names: str) -> list[Tensor]:
        """Weights of the current call: those lent to it, else the site's own."""
        lent = self.share.weights
        return [lent[name] if name in lent else getattr(self, name) for name in names]

    def weights(self, like: Tensor, *names: str) -> list[Tensor]:
        """Detached weights in the dtype of ``like``."""
        return [getattr(self, name).detach().to(like.dtype) for name in names]

    def count(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())


def kaiming(*shape: int) -> nn.Parameter:
    """Weights [..., out, in] as ``nn.Linear`` draws them: Kaiming-uniform with a = sqrt 5, each matrix by its own."""
    weight = torch.empty(shape)
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(weight.uniform_(-bound, bound))


def zeros(*shape: int) -> nn.Parameter:
    """Weights that change nothing."""
    return nn.Parameter(torch.zeros(shape))


def token_sum(grads: Tensor) -> Tensor:
    """[B, T, ...] -> [B, ...], added up in float32 or wider."""
    return grads.sum(1, dtype=torch.promote_types(grads.dtype, torch.float32))
