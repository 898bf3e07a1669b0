"""What everything that learns has in common: where it plugs in, what of it decays, whether it is shared.

A *part* is a module with weights of its own. A *site* is a part that the gate may score and switch: one kind of module
at one layer, in one stream where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from cegate import ops
from cegate.backbone.backbone import Backbone, Features
from cegate.backbone.ports import Plug, Tokens
from cegate.config import ToolboxConfig
from cegate.sites import SiteId, kinds, register_kind


class Part(nn.Module):
    """Something that learns beside a frozen backbone."""

    deployed: bool = True
    """Whether it belongs to the model that one shares; a part that is not serves training alone."""
    adapts: bool = True
    """Whether it changes the backbone's features; in the frozen stage such parts stand aside."""
    active: bool = True
    """Whether it takes part now."""
    further: int = 0
    """Channels, the last ones, that it takes for a second raster's: NaN there is what is not known."""

    def enter(self, images: Tensor) -> Tensor:
        """What it makes of images [B, bands, H, W] before the backbone sees them."""
        return images

    def plugs(self) -> Iterable[Plug]:
        """Where it takes part in the backbone's program."""
        return ()

    def plugs_of_call(self, images: Tensor, grid: tuple[int, int]) -> Iterable[Plug]:
        """Where it takes part in the program of one call on images [B, bands, H, W] with a grid (h, w) of tokens."""
        return ()

    def change(self, features: Features, images: Tensor) -> Features:
        """What it makes of the backbone's features before the head sees them.

        Args:
            features: of the backbone, or of the part before.
            images: [B, bands, H, W], what the backbone saw.
        """
        return features

    def no_weight_decay(self) -> set[str]:
        """Names of its own weights that do not decay, besides norms, biases, embeddings and scalars."""
        return set()


Unpack = Callable[[Tensor], Mapping[str, Tensor]]


class Tap(Protocol):
    """Hears of every weight's gradient, sample by sample, during one backward pass."""

    def linear(self, site: SiteId, unpack: Unpack, inputs: Tensor, grads: Tensor) -> None:
        """Sample b's gradient of a weight [out, in] is ``grads[b]^T inputs[b]``.

        Args:
            site: whose weight.
            unpack: splits something of the weight's shape into the site's parameters.
            inputs: [B, T, in].
            grads: [B, T, out].
        """

    def direct(self, site: SiteId, name: str, grads: Tensor) -> None:
        """Sample b's gradient of a parameter is ``grads[b]``; grads are [B, *parameter.shape]."""


@dataclass(frozen=True)
class Use:
    """How a site takes part in a call."""

    adapters: Sequence[int] | None = None
    """Adapter of each sample, or -1 where the site is off, as in :mod:`cegate.ops`; None: all samples alike."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights in place of the site's own, [A, ...] where ``adapters`` index them; empty: the site's own."""
    tap: Tap | None = None
    """Hears of the gradients. The site then runs a backward pass of its own, and its weights collect none."""


PLAIN = Use()
Add = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]


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


class Site(Part):
    """One kind of module at one layer.

    A kind is a subclass with `order`, `build` and `plugs`, registered by `site_kind`; nothing else names it. Its
    weights are its own parameters. Its backward pass, for Fisher scores, it writes itself and tells `Use.tap`.
    """

    order: ClassVar[int] = 0
    """Where several sites meet at a port, a lower one comes first."""

    def __init__(self, site: SiteId) -> None:
        super().__init__()
        self.site = site

    @classmethod
    def build(cls, site: SiteId, backbone: Backbone, config: ToolboxConfig) -> Site:
        """A fresh site for a backbone."""
        raise TypeError(f"{cls.__name__} is no kind of module")

    def plugs(self, use: Use = PLAIN) -> Iterable[Plug]:
        """Where the site adds something, bound to how it takes part."""
        raise TypeError(f"{type(self).__name__} is no kind of module")

    def plug(self, port: str, function: Callable, use: Use) -> Plug:
        """``function(use, *tensors, tokens)`` at a port of the site's layer; order is the kind's."""

        def at_port(*arguments: Tensor | Tokens) -> Tensor:
            return function(use, *arguments)

        return Plug(port, self.site.layer, self.order, at_port)

    def run(self, use: Use, x: Tensor, base: Tensor, add: Add, backward: Backward) -> Tensor:
        """``add(x, base)``, which is base plus a function of x.

        Where a tap listens, ``backward(x, dy) -> dx`` differentiates that function and tells the tap the gradients.
        """
        if use.tap is None:
            return add(x, base)
        anchor = torch.ones((), device=x.device, requires_grad=True)  # below the first site x itself needs no gradient
        return _Observed.apply(anchor, x, base, add, backward)

    def operands(self, use: Use, *names: str) -> list[Tensor]:
        """Weights of a call: those lent to it, else the site's own."""
        lent = use.weights
        return [lent[name] if name in lent else getattr(self, name) for name in names]

    def weights(self, like: Tensor, *names: str) -> list[Tensor]:
        """Detached weights in the dtype of ``like``."""
        return [getattr(self, name).detach().to(like.dtype) for name in names]

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Weight name -> weight; those of another stream's site that lies below it are not among them."""
        return dict(self.named_parameters(recurse=False))

    def count(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.own_parameters().values())


KINDS: dict[str, type[Site]] = {}
"""Kind -> its class."""


def site_kind(name: str) -> Callable[[type[Site]], type[Site]]:
    """Register a class as the kind ``name`` of site; ``toolbox.kinds`` then takes the name."""

    def register(cls: type[Site]) -> type[Site]:
        if name not in kinds():
            register_kind(name)
        KINDS[name] = cls
        return cls

    return register


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
