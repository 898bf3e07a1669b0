"""Injectors: cross attention in which geospatial queries look at the backbone's features (CrossEarth, Eq. 7).

On the backbone's outputs they are a neck, ``f_I(f_G(X), f_phi(X))``; at blocks they are functions at the block port,
whose results go on through the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.backbone.backbone import Features
from cegate.backbone.ports import Plug, Tokens
from cegate.errors import ConfigError
from cegate.parts.gse import GSE
from cegate.parts.part import Part

Place = Literal["outputs", "blocks"]
ORDER = 200
"""At a block's output: after sites and Rein."""


class Injector(nn.Module):
    """``F + gamma * W_o attention(W_q LN(G), W_k LN(F), W_v LN(F))`` on patch tokens F; gamma [C] starts at 0.

    Args:
        channels: C of queries and features.
        width: of queries, keys and values together.
        heads: attention heads.
        residual: False gives the attention's output alone, cross attention taken literally; then there is no gamma.

    Raises:
        ConfigError: heads do not divide the width.
    """

    def __init__(self, channels: int, width: int = 256, heads: int = 8, *, residual: bool = True) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ConfigError(
                f"injector.width={width} is not a positive multiple of injector.heads={heads}; use e.g. width "
                f"{max(width // max(heads, 1), 1) * max(heads, 1)}"
            )
        self.heads, self.residual = heads, residual
        self.norm_query, self.norm_feature = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, width) for _ in range(3))
        self.out = nn.Linear(width, channels)
        if residual:
            self.gamma = nn.Parameter(torch.zeros(channels))

    def no_weight_decay(self) -> set[str]:
        """The gamma that lets the injection in."""
        return {"gamma"} if self.residual else set()

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """Patch tokens [B, N, C] and queries [B, M, C] -> [B, M, C]; beside a residual M = N."""
        seen = self.norm_feature(features)
        q, k, v = self.query(self.norm_query(queries)), self.key(seen), self.value(seen)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, ., width / heads]
        found = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return features + self.gamma * found if self.residual else found


class Injection(Part):
    """GSE and one injector for each place; a part of the network.

    On outputs it changes the features on their way to the head (:meth:`change`). At blocks :meth:`plugs_of_call` gives
    the functions of one call, bound to that call's queries, so that nothing of a call is kept here. Features that no
    one hands to :meth:`change`, and calls without those plugs, know nothing of it: so the restoration of masked images
    sees the backbone alone.

    Args:
        bands: of the images.
        channels: C of the backbone.
        places: number of output maps, or with ``at="blocks"`` the layers after which it injects.
        at: ``outputs`` (Eq. 7), or ``blocks``.
        width, heads, residual: of every injector.
        chain: the result of a place is the next place's queries (outputs only).
        test: also inject in evaluation mode (Eq. 7); False leaves features alone there.
        widths: of the GSE.

    Raises:
        ConfigError: heads do not divide the width, or blocks in a chain.
    """

    def __init__(
        self,
        bands: int,
        channels: int,
        places: int | Sequence[int] = 4,
        *,
        at: Place = "outputs",
        width: int = 256,
        heads: int = 8,
        residual: bool = True,
        chain: bool = False,
        test: bool = True,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if chain and at == "blocks":
            raise ConfigError(
                "injector.chain=true goes with injector.at=outputs; blocks hand their results on themselves"
            )
        self.layers = list(range(places)) if isinstance(places, int) else list(places)
        self.at, self.chain, self.test = at, chain, test
        self.gse = GSE(bands, channels, widths)
        self.injectors = nn.ModuleList([Injector(channels, width, heads, residual=residual) for _ in self.layers])

    @property
    def on(self) -> bool:
        """Whether it takes part in a forward pass of the current mode."""
        return self.active and (self.training or self.test)

    def change(self, features: Features, images: Tensor) -> Features:
        """Inject into output maps on the token grid, before any resizing; shapes stay.

        Args:
            features: with ``maps`` [B, C, h, w], shallow to deep; anything with ``_replace``.
            images: [B, bands, H, W], normalised, as the backbone saw them.
        """
        if not self.on or self.at == "blocks":
            return features
        grid = tuple(features.maps[0].shape[-2:])
        queries, results = self.gse(images, grid), []
        for injector, level in zip(self.injectors, features.maps, strict=True):
            tokens = injector(level.flatten(2).mT, queries)
            if self.chain:
                queries = tokens
            results.append(tokens.mT.unflatten(2, grid))
        return features._replace(maps=results)

    def plugs_of_call(self, images: Tensor, grid: tuple[int, int]) -> list[Plug]:
        """What it plugs in for one call on images [B, bands, H, W]: after Rein, at the block port of its layers."""
        if not self.on or self.at == "outputs":
            return []
        queries = self.gse(images, grid)
        return [
            Plug("block", layer, ORDER, partial(_inject_block, injector, queries))
            for layer, injector in zip(self.layers, self.injectors, strict=True)
        ]


def _inject_block(injector: Injector, queries: Tensor, y: Tensor, tokens: Tokens) -> Tensor:
    """y [B, P + N, C], the block's output; prefix tokens pass."""
    patches = injector(y[:, tokens.prefix :], queries)
    return torch.cat([y[:, : tokens.prefix], patches], dim=1) if tokens.prefix else patches
