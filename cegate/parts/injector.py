"""Injectors: cross attention in which geospatial queries look at the backbone's features (CrossEarth, Eq. 7).

On the backbone's outputs they are a neck, ``f_I(f_G(X), f_phi(X))``; at blocks they are functions at the block port, whose
results go on through the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.errors import ConfigError
from cegate.parts.gse import GSE, WIDTHS

Place = Literal["outputs", "blocks"]


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


class Injection(nn.Module):
    """GSE and one injector for each place.

    On outputs it is called as a neck, ``injection(images, maps) -> maps``. At blocks :meth:`at_blocks` gives the functions
    of one call, bound to that call's queries, so that nothing of a call is kept here.

    Args:
        bands: of the images.
        channels: C of the backbone.
        places: number of output maps, or the layers after which it injects.
        width, heads, residual: of every injector.
        chain: the result of a place is the next place's queries (outputs only).
        test: also inject in evaluation mode (Eq. 7); False leaves features alone there.
        widths: of the GSE.

    Raises:
        ConfigError: heads do not divide the width.
    """

    deployed = True

    def __init__(
        self,
        bands: int,
        channels: int,
        places: int | Sequence[int] = 4,
        *,
        width: int = 256,
        heads: int = 8,
        residual: bool = True,
        chain: bool = False,
        test: bool = True,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__()
        self.layers = list(range(places)) if isinstance(places, int) else list(places)
        self.chain, self.test = chain, test
        self.gse = GSE(bands, channels, widths)
        self.injectors = nn.ModuleList(
            [Injector(channels, width, heads, residual=residual) for _ in self.layers]
        )

    @property
    def on(self) -> bool:
        """Whether it takes part in a forward pass of the current mode."""
        return self.training or self.test

    def no_weight_decay(self) -> set[str]:
        """Each injector names its own."""
        return set()

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Inject into output maps.

        Args:
            images: [B, bands, H, W], normalised, as the backbone saw them.
            maps: [B, C, h, w] on the token grid, shallow to deep, before any resizing.

        Returns:
            Maps of the same shapes.
        """
        if not self.on:
            return list(maps)
        grid = tuple(maps[0].shape[-2:])
        queries = self.gse(images, grid)
        results = []
        for injector, features in zip(self.injectors, maps, strict=True):
            tokens = injector(features.flatten(2).mT, queries)
            if self.chain:
                queries = tokens
            results.append(tokens.mT.unflatten(2, grid))
        return results

    def at_blocks(self, images: Tensor, grid: tuple[int, int]) -> dict[int, Callable[[Tensor, object], Tensor]]:
        """Functions for the block port of one call: layer -> ``function(y, tokens)`` with y [B, P + N, C].

        Prefix tokens (``tokens.prefix`` of them) pass through. Empty where it takes no part.
        """
        if not self.on:
            return {}
        queries = self.gse(images, grid)
        return {
            layer: _BlockPort(injector, queries) for layer, injector in zip(self.layers, self.injectors, strict=True)
        }


class _BlockPort:
    """An injector with the queries of one call."""

    def __init__(self, injector: Injector, queries: Tensor) -> None:
        self.injector, self.queries = injector, queries

    def __call__(self, y: Tensor, tokens) -> Tensor:
        prefix = y[:, : tokens.prefix]
        patches = self.injector(y[:, tokens.prefix :], self.queries)
        return torch.cat([prefix, patches], dim=1) if tokens.prefix else patches
