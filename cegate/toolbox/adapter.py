"""Semantic kind: bottleneck adapter parallel to the MLP (AdaptFormer, NeurIPS 2022; CrossEarth-Gate)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate import ops
from cegate.config import SemanticConfig
from cegate.toolbox.base import Site, TokenLayout, kaiming, token_sum, zeros


class Adapter(Site):
    """``y += s up(gelu(down(x_att)))`` on all tokens; x_att is the un-normalised residual stream after attention."""

    kind = "semantic"

    def __init__(self, layer: int, width: int, config: SemanticConfig) -> None:
        super().__init__(layer)
        self.scale = config.scale
        self.down, self.down_bias = kaiming(config.width, width), zeros(config.width)
        self.up, self.up_bias = zeros(width, config.width), zeros(width)
        self._x_att: Tensor | None = None  # lives from the block's second norm to the block's end

    def attach(self, block: nn.Module, tokens: TokenLayout) -> list[RemovableHandle]:
        return [
            block.norm2.register_forward_pre_hook(self.catch_input),
            block.register_forward_hook(self.add_to_block),
        ]

    def catch_input(self, module: nn.Module, args: tuple[Tensor]) -> None:
        """Hook before the block's second norm, whose input is x_att [B, T, C]."""
        self._x_att = args[0]

    def add_to_block(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Hook on the block output y [B, T, C]."""
        x, self._x_att = self._x_att, None
        return self.run(x, y, self._add, self._backward)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        down, up, down_bias, up_bias = self.operands("down", "up", "down_bias", "up_bias")
        rest = {"activation": "gelu", "scale": self.scale, "adapters": self.share.adapters}
        return ops.low_rank(x, down, up, base=y, down_bias=down_bias, up_bias=up_bias, **rest)

    def _backward(self, x: Tensor, dy: Tensor) -> Tensor:
        down, up, down_bias = self.weights(x, "down", "up", "down_bias")
        dx, dpre, hidden = ops.low_rank_factors(
            x, dy, down, up, down_bias=down_bias, activation="gelu", scale=self.scale
        )
        self.tap.linear(self.name, lambda w: {"down": w}, x, dpre)
        self.tap.direct(self.name, "down_bias", token_sum(dpre))
        self.tap.linear(self.name, lambda w: {"up": w}, hidden, dy)
        self.tap.direct(self.name, "up_bias", self.scale * token_sum(dy))
        return dx
