"""Rein: learned tokens that refine the patch tokens after every block (Wei et al., CVPR 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from cegate.backbone.backbone import Backbone, Features
from cegate.backbone.ports import Plug, Tokens
from cegate.config import RefinerConfig
from cegate.errors import ConfigError
from cegate.parts.part import Part

START_SCALE = 0.001
ORDER = 100
"""At a block's output: after every kind of site."""


class Rein(Part):
    """``f += s W_f(D + f)`` with ``D = softmax(f T^T / sqrt C)[1:] W_t(T[1:])`` on patch tokens f [N, C] of each block.

    Each layer has m tokens ``T = A B`` of rank r; both linear maps W and the scale s serve all layers. The first token
    takes attention and gives nothing back. Prefix tokens pass through. Within a block the sites of a toolbox come
    first, and the refinement sees what they made of the block's output.

    Args:
        backbone: whose blocks are refined.
        config: tokens m >= 2 and rank r >= 1.
        query_width: width of the queries that the tokens also give, for a head that takes them; ``None``: none.

    Raises:
        ConfigError: too few tokens, or no rank.
    """

    def __init__(self, backbone: Backbone, config: RefinerConfig, *, query_width: int | None = None) -> None:
        super().__init__()
        if config.tokens < 2 or config.rank < 1:
            raise ConfigError(
                f"refiner.tokens={config.tokens}, refiner.rank={config.rank}: use 2 tokens or more (the first gives "
                "nothing back) and a rank of 1 or more"
            )
        depth, width, patch = backbone.depth, backbone.width, backbone.patch
        bound = math.sqrt(6 / (3 * patch**2 + math.sqrt(width * config.rank)))
        self.token_a = nn.Parameter(torch.empty(depth, config.tokens, config.rank).uniform_(-bound, bound))
        self.token_b = nn.Parameter(torch.empty(depth, config.rank, width).uniform_(-bound, bound))
        self.token_mlp, self.patch_mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(START_SCALE))
        self.gives_queries = query_width is not None
        if self.gives_queries:
            self.query_mlp, self.query_merge = nn.Linear(width, query_width), nn.Linear(3 * query_width, query_width)

    def plugs(self) -> Iterable[Plug]:
        return [Plug("block", layer, ORDER, partial(self._refine_block, layer)) for layer in range(len(self.token_a))]

    def change(self, features: Features, images: Tensor) -> Features:
        return features._replace(queries=self.queries()) if self.gives_queries else features

    def no_weight_decay(self) -> set[str]:
        return {"token_a", "token_b", "scale"}

    def tokens(self, layer: int) -> Tensor:
        """The tokens of a layer, [m, C]."""
        return self.token_a[layer] @ self.token_b[layer]

    def refine(self, patches: Tensor, layer: int) -> Tensor:
        """Patch tokens [B, N, C] after a block -> refined, [B, N, C]."""
        tokens = self.tokens(layer)
        share = (patches @ tokens.mT / math.sqrt(patches.shape[-1])).softmax(-1)  # [B, N, m]
        found = share[..., 1:] @ self.token_mlp(tokens[1:])
        return patches + self.scale * self.patch_mlp(found + patches)

    def queries(self) -> Tensor:
        """Queries [m, query_width] float32 or wider of the tokens of all layers: their maximum, mean and last one."""
        with torch.autocast(self.token_a.device.type, enabled=False):
            tokens = self.query_mlp(self.token_a @ self.token_b)  # [L, m, width]
            # channel by channel, as published: the three values of a channel lie side by side
            merged = torch.stack([tokens.amax(0), tokens.mean(0), tokens[-1]], dim=-1).flatten(1)
            return self.query_merge(merged)

    def _refine_block(self, layer: int, y: Tensor, tokens: Tokens) -> Tensor:
        """y [B, P + N, C], the block's output."""
        refined = self.refine(y[:, tokens.prefix :], layer)
        return torch.cat([y[:, : tokens.prefix], refined], dim=1) if tokens.prefix else refined
