"""Spatial kind: LoRA on query and value (Hu et al., ICLR 2022; CrossEarth-Gate, spatial module)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cegate import ops
from cegate.config import SpatialConfig
from cegate.toolbox.base import Site, TokenLayout, kaiming, zeros


class Lora(Site):
    """``q += s (u A_q) B_q`` and ``v += s (u A_v) B_v`` with ``s = alpha / rank``, u the input of the qkv projection.

    Args:
        width: channels C of u.
        inner: channels of q and of v (C, except where heads have another width).
    """

    kind = "spatial"

    def __init__(self, layer: int, width: int, inner: int, config: SpatialConfig) -> None:
        super().__init__(layer)
        self.scale = (config.rank if config.alpha is None else config.alpha) / config.rank
        self.down_q, self.down_v = kaiming(config.rank, width), kaiming(config.rank, width)
        self.up_q, self.up_v = zeros(inner, config.rank), zeros(inner, config.rank)

    def attach(self, block: nn.Module, tokens: TokenLayout) -> list[RemovableHandle]:
        attn = block.attn
        if getattr(attn, "qkv", None) is not None:
            return [attn.qkv.register_forward_hook(self.add_to_qkv)]
        return [
            attn.q_proj.register_forward_hook(self.add_to_q),
            attn.v_proj.register_forward_hook(self.add_to_v),
        ]

    def add_to_qkv(self, module: nn.Module, args: tuple[Tensor], qkv: Tensor) -> Tensor:
        """Hook of a fused projection: u [B, T, C], qkv [B, T, 3 inner]."""

        def add(u: Tensor, qkv: Tensor) -> Tensor:
            weights = self.operands("down_q", "up_q", "down_v", "up_v")
            return ops.low_rank_qv_(qkv, u, *weights, self.scale, adapters=self.share.adapters)

        def backward(u: Tensor, dqkv: Tensor) -> Tensor:
            dq, _, dv = dqkv.chunk(3, dim=-1)
            return self._backward("q", u, dq).add_(self._backward("v", u, dv))

        return self.run(args[0], qkv, add, backward)

    def add_to_q(self, module: nn.Module, args: tuple[Tensor], q: Tensor) -> Tensor:
        """Hook of a query projection."""
        return self._add("q", args[0], q)

    def add_to_v(self, module: nn.Module, args: tuple[Tensor], v: Tensor) -> Tensor:
        """Hook of a value projection."""
        return self._add("v", args[0], v)

    def _add(self, part: str, u: Tensor, base: Tensor) -> Tensor:
        def add(u: Tensor, base: Tensor) -> Tensor:
            down, up = self.operands(f"down_{part}", f"up_{part}")
            return ops.low_rank(u, down, up, base=base, scale=self.scale, adapters=self.share.adapters)

        return self.run(u, base, add, lambda u, dy: self._backward(part, u, dy))

    def _backward(self, part: str, u: Tensor, dy: Tensor) -> Tensor:
        down, up = self.weights(u, f"down_{part}", f"up_{part}")
        du, dpre, hidden = ops.low_rank_factors(u, dy, down, up, scale=self.scale)
        self.tap.linear(self.name, lambda w: {f"down_{part}": w}, u, dpre)
        self.tap.linear(self.name, lambda w: {f"up_{part}": w}, hidden, dy)
        return du

    def merge(self, attn: nn.Module) -> None:
        """Add the learned product to the frozen projection; inference then costs nothing extra."""
        for part, row in (("q", 0), ("v", 2)):
            delta = self.scale * getattr(self, f"up_{part}") @ getattr(self, f"down_{part}")
            if getattr(attn, "qkv", None) is not None:
                attn.qkv.weight.data[row * len(delta) : (row + 1) * len(delta)] += delta
            else:
                getattr(attn, f"{part}_proj").weight.data += delta
