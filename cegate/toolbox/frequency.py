"""Frequency kind: Earth-Adapter's mixture of a direct, a low-pass and a high-pass expert (arXiv:2504.06220).

Written project-first: the low-pass acts on the token grid and a projection on channels, so they commute, and the filter
runs on 2 d channels in place of C.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate import ops
from cegate.config import FrequencyConfig
from cegate.toolbox.base import Site, TokenLayout, kaiming, zeros

LEARNABLE_START = 0.3
WEIGHTS = ("down", "down_bias", "up", "up_bias", "router", "router_bias", "scale")


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
        mixed = self.run(patches, patches, self._mix, self._backward)
        return mixed if prefix.shape[1] == 0 else torch.cat([prefix, mixed], dim=1)

    def _mix(self, patches: Tensor, base: Tensor) -> Tensor:
        # the operator adds to what it reads, so base is patches once more
        *weights, cutoff = self.operands(*WEIGHTS, "cutoff")
        rest = {"cutoff": cutoff, "band": self.band, "adapters": self.share.adapters}
        return ops.frequency_adapter(patches, self._tokens.grid, *weights, **rest)

    def _backward(self, y: Tensor, dz: Tensor) -> Tensor:
        weights = self.weights(y, *WEIGHTS)
        learnable = isinstance(self.cutoff, nn.Parameter)
        cutoff = self.cutoff.detach() if learnable else self.cutoff
        found = ops.frequency_adapter_factors(y, dz, self._tokens.grid, *weights, cutoff=cutoff, band=self.band)
        self.tap.linear(self.name, self._unpack_down, y, found.dhidden)
        self.tap.linear(self.name, self._unpack_up, found.mixed, dz)
        self.tap.direct(self.name, "down_bias", found.dbias[:, :-3].unflatten(1, (3, -1)))
        self.tap.direct(self.name, "router_bias", found.dbias[:, -3:])
        self.tap.direct(self.name, "scale", found.dscale)
        if learnable:
            self.tap.direct(self.name, "cutoff", found.dcutoff)
        return found.dx

    def _unpack_down(self, weight: Tensor) -> dict[str, Tensor]:
        return {"down": weight[:-3].unflatten(0, (3, -1)), "router": weight[-3:]}

    def _unpack_up(self, weight: Tensor) -> dict[str, Tensor]:
        return {"up": weight[:, :-3].unflatten(1, (3, -1)).transpose(0, 1), "up_bias": weight[:, -3:].mT}
