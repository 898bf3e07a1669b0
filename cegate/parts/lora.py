"""Spatial kind: LoRA on query and value (Hu et al., ICLR 2022; CrossEarth-Gate, spatial module)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from cegate import ops
from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Plug, Tokens
from cegate.config import SpatialConfig, ToolboxConfig
from cegate.parts.part import PLAIN, Site, Use, kaiming, site_kind, zeros
from cegate.sites import SiteId


@site_kind("spatial")
class Lora(Site):
    """``q += s (u A_q) B_q`` and ``v += s (u A_v) B_v`` with ``s = alpha / rank``, u the input of the qkv projection.

    Args:
        width: channels C of u.
        inner: channels of q (C, except where heads have another width).
        value: channels of v; default: those of q.
    """

    def __init__(
        self, site: SiteId, width: int, inner: int, config: SpatialConfig, *, value: int | None = None
    ) -> None:
        super().__init__(site)
        self.scale = (config.rank if config.alpha is None else config.alpha) / config.rank
        self.down_q, self.down_v = kaiming(config.rank, width), kaiming(config.rank, width)
        self.up_q, self.up_v = zeros(inner, config.rank), zeros(value or inner, config.rank)

    @classmethod
    def build(cls, site: SiteId, backbone: Backbone, config: ToolboxConfig) -> Lora:
        return cls(site, backbone.width, backbone.inner, config.spatial, value=backbone.value_width)

    def plugs(self, use: Use = PLAIN) -> Iterable[Plug]:
        return [self.plug("qkv", self.add_to_qkv, use)]

    def add_to_qkv(self, use: Use, u: Tensor, qkv: Tensor | tuple, tokens: Tokens) -> Tensor | tuple:
        """u [B, T, C]; qkv [B, T, 3 inner], changed in place, or (q, k, v)."""
        if not isinstance(qkv, Tensor):
            q, k, v = qkv
            return self._add(use, "q", u, q), k, self._add(use, "v", u, v)

        def add(u: Tensor, qkv: Tensor) -> Tensor:
            weights = self.operands(use, "down_q", "up_q", "down_v", "up_v")
            return ops.low_rank_qv_(qkv, u, *weights, self.scale, adapters=use.adapters)

        def backward(u: Tensor, dqkv: Tensor) -> Tensor:
            dq, _, dv = dqkv.chunk(3, dim=-1)
            return self._backward(use, "q", u, dq).add_(self._backward(use, "v", u, dv))

        return self.run(use, u, qkv, add, backward)

    def _add(self, use: Use, part: str, u: Tensor, base: Tensor) -> Tensor:
        def add(u: Tensor, base: Tensor) -> Tensor:
            down, up = self.operands(use, f"down_{part}", f"up_{part}")
            return ops.low_rank(u, down, up, base=base, scale=self.scale, adapters=use.adapters)

        return self.run(use, u, base, add, lambda u, dy: self._backward(use, part, u, dy))

    def _backward(self, use: Use, part: str, u: Tensor, dy: Tensor) -> Tensor:
        down, up = self.weights(u, f"down_{part}", f"up_{part}")
        du, dpre, hidden = ops.low_rank_factors(u, dy, down, up, scale=self.scale)
        use.tap.linear(self.site, lambda w: {f"down_{part}": w}, u, dpre)
        use.tap.linear(self.site, lambda w: {f"up_{part}": w}, hidden, dy)
        return du

    def merge(self, attn: nn.Module) -> None:
        """Add the learned product to the frozen projection; inference then costs nothing extra."""
        for part, row in (("q", 0), ("v", 2)):
            delta = self.scale * getattr(self, f"up_{part}") @ getattr(self, f"down_{part}")
            if getattr(attn, "qkv", None) is not None:
                attn.qkv.weight.data[row * len(delta) : (row + 1) * len(delta)] += delta
            else:
                getattr(attn, f"{part}_proj").weight.data += delta
