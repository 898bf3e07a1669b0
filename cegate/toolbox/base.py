"""What every site has in common, and how Fisher scoring looks inside one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate.config import Kind


@dataclass
class TokenLayout:
    """How the tokens of the current forward pass lie: prefix tokens first, then the grid row by row."""

    prefix: int
    grid: tuple[int, int] = (0, 0)


Map = Callable[[Tensor], Tensor]
Unpack = Callable[[Tensor], Mapping[str, Tensor]]


class Tap(Protocol):
    """Hears of every use of a weight, so that per-sample gradients can be formed during one backward pass."""

    def linear(self, site: str, unpack: Unpack, inputs: Tensor, output: Tensor) -> Tensor:
        """``output = inputs @ weight.T`` was computed.

        Args:
            unpack: splits something of the weight's shape [out, in] into the site's parameters.
            inputs: [B, T, in].
            output: [B, T, out]; the tensor to go on with is returned.
        """

    def expand(self, site: str, name: str, parameter: Tensor, batch: int) -> Tensor:
        """Return [B, *parameter.shape]: the parameter once per sample, so that each sample has its own gradient."""


class _Retraced(torch.autograd.Function):
    """``fast(x)`` now, and in backward ``traced(x)``, whose tap hears of every weight.

    So a scoring pass keeps x alone, as a training step does; the small tensors of a site live only in its own backward.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, x: Tensor, fast: Map, traced: Map) -> Tensor:
        device = x.device.type
        ctx.traced, ctx.autocast = traced, (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x)
        return fast(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            y = ctx.traced(x)
        torch.autograd.backward(y, grad)
        return None, x.grad, None, None


class Site(nn.Module):
    """One module kind at one layer.

    Subclasses add their delta through hooks on a timm block and keep two forms of the same arithmetic: the fast one
    through :mod:`cegate.ops`, and, while ``tap`` is set, one that shows every weight to it.
    """

    kind: ClassVar[Kind]
    tap: Tap | None = None

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

    def run(self, x: Tensor, fast: Map, traced: Map) -> Tensor:
        """``fast(x)``; while a tap listens, with a backward pass that goes through ``traced``."""
        if self.tap is None:
            return fast(x)
        anchor = torch.ones((), device=x.device, requires_grad=True)  # below the first site x itself needs no gradient
        return _Retraced.apply(anchor, x, fast, traced)

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
