"""Frequency kind: Earth-Adapter's mixture of a direct, a low-pass and a high-pass expert (arXiv:2504.06220).

Written project-first: the low-pass acts on the token grid and a projection on channels, so they commute, and the filter
runs on 2 d channels in place of C.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cegate import ops
from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Plug, Tokens
from cegate.config import FrequencyConfig, ToolboxConfig
from cegate.parts.part import PLAIN, Site, Use, kaiming, site_kind, zeros
from cegate.sites import SiteId

LEARNABLE_START = 0.3
WEIGHTS = ("down", "down_bias", "up", "up_bias", "router", "router_bias", "scale")


@site_kind("frequency")
class EarthAdapter(Site):
    """``z[:, P:] += s_f mixture(y[:, P:])`` on patch tokens; prefix tokens pass through."""

    def __init__(self, site: SiteId, width: int, config: FrequencyConfig) -> None:
        super().__init__(site)
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

    @classmethod
    def build(cls, site: SiteId, backbone: Backbone, config: ToolboxConfig) -> EarthAdapter:
        return cls(site, backbone.width, config.frequency)

    def plugs(self, use: Use = PLAIN) -> Iterable[Plug]:
        return [self.plug("block", self.add_to_block, use)]

    def add_to_block(self, use: Use, y: Tensor, tokens: Tokens) -> Tensor:
        """y [B, P + H W, C], the block's output."""
        *weights, cutoff = self.operands(use, *WEIGHTS, "cutoff")
        rest = {"cutoff": cutoff, "band": self.band, "adapters": use.adapters}
        if use.tap is None:
            return ops.frequency_adapter(y, tokens.grid, *weights, prefix=tokens.prefix, **rest)

        def mix(patches: Tensor, base: Tensor) -> Tensor:
            # the operator adds to what it reads, so base is patches once more
            return ops.frequency_adapter(patches, tokens.grid, *weights, **rest)

        def backward(patches: Tensor, dz: Tensor) -> Tensor:
            return self._backward(use, tokens, patches, dz)

        patches = y[:, tokens.prefix :]
        mixed = self.run(use, patches, patches, mix, backward)
        return torch.cat([y[:, : tokens.prefix], mixed], dim=1) if tokens.prefix else mixed

    def _backward(self, use: Use, tokens: Tokens, y: Tensor, dz: Tensor) -> Tensor:
        weights = self.weights(y, *WEIGHTS)
        learnable = isinstance(self.cutoff, nn.Parameter)
        cutoff = self.cutoff.detach() if learnable else self.cutoff
        found = ops.frequency_adapter_factors(y, dz, tokens.grid, *weights, cutoff=cutoff, band=self.band)
        use.tap.linear(self.site, self._unpack_down, y, found.dhidden)
        use.tap.linear(self.site, self._unpack_up, found.mixed, dz)
        use.tap.direct(self.site, "down_bias", found.dbias[:, :-3].unflatten(1, (3, -1)))
        use.tap.direct(self.site, "router_bias", found.dbias[:, -3:])
        use.tap.direct(self.site, "scale", found.dscale)
        if learnable:
            use.tap.direct(self.site, "cutoff", found.dcutoff)
        return found.dx

    def _unpack_down(self, weight: Tensor) -> dict[str, Tensor]:
        return {"down": weight[:-3].unflatten(0, (3, -1)), "router": weight[-3:]}

    def _unpack_up(self, weight: Tensor) -> dict[str, Tensor]:
        return {"up": weight[:, :-3].unflatten(1, (3, -1)).transpose(0, 1), "up_bias": weight[:, -3:].mT}
