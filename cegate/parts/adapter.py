"""Semantic kind: bottleneck adapter parallel to the MLP (AdaptFormer, NeurIPS 2022; CrossEarth-Gate)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cegate import ops
from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Plug, Tokens
from cegate.config import SemanticConfig, ToolboxConfig
from cegate.parts.part import PLAIN, Site, Use, kaiming, site_kind, token_sum, zeros
from cegate.sites import SiteId


@site_kind("semantic")
class ParallelAdapter(Site):
    """``y += s up(gelu(down(x_att)))`` on all tokens; x_att is the un-normalised residual stream after attention."""

    def __init__(self, site: SiteId, width: int, config: SemanticConfig) -> None:
        super().__init__(site)
        self.scale = config.scale
        self.down, self.down_bias = kaiming(config.width, width), zeros(config.width)
        self.up, self.up_bias = zeros(width, config.width), zeros(width)

    @classmethod
    def build(cls, site: SiteId, backbone: Backbone, config: ToolboxConfig) -> ParallelAdapter:
        return cls(site, backbone.width, config.semantic)

    def plugs(self, use: Use = PLAIN) -> Iterable[Plug]:
        return [self.plug("mlp", self.add_to_stream, use)]

    def add_to_stream(self, use: Use, x: Tensor, h: Tensor, y: Tensor, tokens: Tokens) -> Tensor:
        """x and y [B, T, C]: the stream before and after the MLP."""

        def add(x: Tensor, y: Tensor) -> Tensor:
            down, up, down_bias, up_bias = self.operands(use, "down", "up", "down_bias", "up_bias")
            rest = {"activation": "gelu", "scale": self.scale, "adapters": use.adapters}
            return ops.low_rank(x, down, up, base=y, down_bias=down_bias, up_bias=up_bias, **rest)

        def backward(x: Tensor, dy: Tensor) -> Tensor:
            down, up, down_bias = self.weights(x, "down", "up", "down_bias")
            rest = {"down_bias": down_bias, "activation": "gelu", "scale": self.scale}
            dx, dpre, hidden = ops.low_rank_factors(x, dy, down, up, **rest)
            use.tap.linear(self.site, lambda w: {"down": w}, x, dpre)
            use.tap.direct(self.site, "down_bias", token_sum(dpre))
            use.tap.linear(self.site, lambda w: {"up": w}, hidden, dy)
            use.tap.direct(self.site, "up_bias", self.scale * token_sum(dy))
            return dx

        return self.run(use, x, y, add, backward)
