"""Semantic kind: bottleneck adapter parallel to the MLP (AdaptFormer, NeurIPS 2022; CrossEarth-Gate)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate import ops
from cegate.config import SemanticConfig
from cegate.toolbox.base import Site, TokenLayout, kaiming, zeros


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
        if self.tap is None:
            return self._delta(x, base=y)
        return y + self.run(x, self._delta, self._delta_traced)

    def _delta(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        biases = {"down_bias": self.down_bias, "up_bias": self.up_bias}
        return ops.low_rank(x, self.down, self.up, base=base, **biases, activation="gelu", scale=self.scale)

    def _delta_traced(self, x: Tensor) -> Tensor:
        tap, batch = self.tap, len(x)
        hidden = tap.linear(self.name, lambda w: {"down": w}, x, F.linear(x, self.down))
        hidden = self.scale * F.gelu(hidden + tap.expand(self.name, "down_bias", self.down_bias, batch).unsqueeze(1))
        delta = tap.linear(self.name, lambda w: {"up": w}, hidden, F.linear(hidden, self.up))
        return delta + self.scale * tap.expand(self.name, "up_bias", self.up_bias, batch).unsqueeze(1)
