"""Frequency kind: Earth-Adapter's mixture of a direct, a low-pass and a high-pass expert (arXiv:2504.06220).

Written project-first: the low-pass acts on the token grid and a projection on channels, so they commute, and the filter
runs on 2 d channels in place of C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate import ops
from cegate.config import FrequencyConfig
from cegate.toolbox.base import Site, TokenLayout, kaiming, zeros

LEARNABLE_START = 0.3


class EarthAdapter(Site):
    """``z[:, P:] += s_f mixture(y[:, P:])`` on patch tokens; prefix tokens pass through."""

    kind = "frequency"

    def __init__(self, layer: int, width: int, config: FrequencyConfig) -> None:
        super().__init__(layer)
        d = config.width
        self.band = config.band
        self.down, self.down_bias = kaiming(3, d, width), zeros(3, d)
        self.up = kaiming(3, width, d) if config.init == "official" else zeros(3, width, d)
        self.up_bias = zeros(3, width)
        self.router, self.router_bias = kaiming(3, width), zeros(3)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.cutoff: nn.Parameter | float = (
            nn.Parameter(torch.tensor(LEARNABLE_START)) if config.cutoff == "learnable" else config.cutoff
        )
        self._tokens: TokenLayout | None = None

    def attach(self, block: nn.Module, tokens: TokenLayout) -> list[RemovableHandle]:
        self._tokens = tokens
        return [block.register_forward_hook(self.add_to_block)]

    def add_to_block(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Hook on the block output y [B, P + H W, C]."""
        prefix, patches = y[:, : self._tokens.prefix], y[:, self._tokens.prefix :]
        mixed = self.run(patches, self._mix, self._mix_traced)
        return mixed if prefix.shape[1] == 0 else torch.cat([prefix, mixed], dim=1)

    def _mix(self, patches: Tensor) -> Tensor:
        return ops.frequency_adapter(
            patches,
            self._tokens.grid,
            self.down,
            self.down_bias,
            self.up,
            self.up_bias,
            self.router,
            self.router_bias,
            self.scale,
            cutoff=self.cutoff,
            band=self.band,
        )

    def _mix_traced(self, y: Tensor) -> Tensor:
        tap, name, batch, d = self.tap, self.name, len(y), self.down.shape[1]
        weight = torch.cat([self.down.flatten(0, 1), self.router])  # [3d + 3, C]
        hidden = tap.linear(name, self._unpack_down, y, F.linear(y, weight))
        direct, low, high, logits = hidden.split([d, d, d, 3], dim=-1)
        filtered = self._low_pass_traced(torch.cat([low, high], dim=-1))
        bias = tap.expand(name, "down_bias", self.down_bias, batch).flatten(1).unsqueeze(1)
        active = F.relu(torch.cat([direct, filtered[..., :d], high - filtered[..., d:]], dim=-1) + bias)
        router_bias = tap.expand(name, "router_bias", self.router_bias, batch).unsqueeze(1)
        weights = (logits + router_bias).softmax(dim=-1)  # [B, N, 3]
        code = torch.cat([(active.unflatten(-1, (3, d)) * weights.unsqueeze(-1)).flatten(2), weights], dim=-1)
        up = torch.cat([self.up.mT.flatten(0, 1), self.up_bias]).mT  # [C, 3d + 3]
        mixture = tap.linear(name, self._unpack_up, code, F.linear(code, up))
        return y + tap.expand(name, "scale", self.scale, batch)[:, None, None] * mixture

    def _unpack_down(self, weight: Tensor) -> dict[str, Tensor]:
        return {"down": weight[:-3].unflatten(0, (3, -1)), "router": weight[-3:]}

    def _unpack_up(self, weight: Tensor) -> dict[str, Tensor]:
        return {"up": weight[:, :-3].unflatten(1, (3, -1)).transpose(0, 1), "up_bias": weight[:, -3:].mT}

    def _low_pass_traced(self, hidden: Tensor) -> Tensor:
        grid = self._tokens.grid
        if not isinstance(self.cutoff, nn.Parameter):
            return ops.low_pass(hidden, grid, cutoff=self.cutoff, band=self.band)
        cutoffs = self.tap.expand(self.name, "cutoff", self.cutoff, len(hidden))
        return torch.cat(
            [ops.low_pass(h[None], grid, cutoff=c, band=self.band) for h, c in zip(hidden, cutoffs, strict=True)]
        )
