"""MMLoRA: low-rank updates of two modalities that share a frozen transformer (MFNet).

Source: Ma et al., A Unified Framework with Multimodal Fine-tuning for Remote Sensing Semantic Segmentation, IEEE TGRS
2025 (arXiv:2410.11160), Eq. 9-12.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Plug, Tokens
from cegate.parts.mm_adapter import ORDER, by_stream, exchange_matrix
from cegate.parts.part import Part, kaiming, zeros


class MMLoRA(Part):
    """LoRA on queries and values of each modality, and on both linear maps of the MLP, where modalities exchange.

    With u the input of a linear map, n the other modality of m, ``mix`` the learned share of a modality's own update,
    and ``s = alpha / rank``::

        q_m <- q_m + s B A u_m                          likewise v, by weights of their own
        f_m <- f_m + mix_m B_m A_m u_m + (1 - mix_m) B_n A_n u_n            f = fc1(u), fc2(u)

    The exchange has no factor s, as in the published code. One modality alone, or two that do not exchange:
    ``f_m <- f_m + s B_m A_m u_m``. Modalities lie behind each other in the batch: one product with A and one with B
    serve both. The exchange cannot be merged into the frozen weights.

    Args:
        depth: blocks of the backbone.
        width: channels C of its stream.
        streams: modalities, 1 or 2.
        exchange: whether two modalities exchange.
        rank, alpha: of every update.
        inner: channels of queries and of values; default: C for both.
        hidden: outputs of fc1 and inputs of fc2; default: 4 C for both.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        streams: int = 2,
        exchange: bool = True,
        rank: int = 4,
        alpha: float = 1.0,
        inner: tuple[int, int] | None = None,
        hidden: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.streams, self.scale, self.layers = streams, alpha / rank, nn.ModuleList()
        (query, value), (wide, narrow) = inner or (width, width), hidden or (4 * width, 4 * width)
        for _ in range(depth):
            layer = nn.Module()
            layer.query, layer.value = LowRank(streams, width, query, rank), LowRank(streams, width, value, rank)
            layer.fc1 = LowRank(streams, width, wide, rank, exchange=exchange)
            layer.fc2 = LowRank(streams, narrow, width, rank, exchange=exchange)
            self.layers.append(layer)

    @classmethod
    def build(cls, backbone: Backbone, **options: object) -> MMLoRA:
        """For the blocks of a backbone."""
        mlp = backbone.vit.blocks[0].mlp
        first = mlp.fc1 if hasattr(mlp, "fc1") else mlp.fc1_g  # SwiGLU: what the activation takes
        sizes = {"inner": (backbone.inner, backbone.value_width), "hidden": (first.out_features, mlp.fc2.in_features)}
        return cls(backbone.depth, backbone.width, **sizes, **options)

    def plugs(self) -> Iterable[Plug]:
        for n, layer in enumerate(self.layers):
            yield Plug("qkv", n, ORDER, partial(self._projections, layer))
            yield Plug("fc1", n, ORDER, partial(self._linear, layer.fc1))
            yield Plug("fc2", n, ORDER, partial(self._linear, layer.fc2))

    def _projections(self, layer: nn.Module, u: Tensor, qkv: Tensor | tuple, tokens: Tokens) -> Tensor | tuple:
        """u [S B, T, C]; qkv [S B, T, 3 inner], or (q, k, v)."""
        u = by_stream(u, self.streams)
        if not isinstance(qkv, Tensor):
            q, k, v = qkv
            return self._plus(q, u, layer.query), k, self._plus(v, u, layer.value)
        # both updates as one: A_q above A_v, and [B_q 0], nothing for keys, [0 B_v]
        down = torch.cat([layer.query.down, layer.value.down], 1)
        rank = down.shape[1] // 2
        q, v = F.pad(layer.query.up, (0, rank)), F.pad(layer.value.up, (rank, 0))
        up = torch.cat([q, torch.zeros_like(q), v], 1)
        return add_product(qkv, u @ down.mT, self.scale * up)

    def _linear(self, update: LowRank, u: Tensor, f: Tensor, tokens: Tokens) -> Tensor:
        """u [S B, T, in] and f [S B, T, out] of a linear map."""
        u = by_stream(u, self.streams)
        if update.mix is None:
            return self._plus(f, u, update)
        hidden = torch.cat((u @ update.down.mT).unbind(0), -1)  # [B T, 2 r]
        up = exchange_matrix(update.mix)[:, :, None, None] * update.up  # [to, from, out, r]
        return add_product(f, hidden.expand(2, -1, -1), up.transpose(1, 2).flatten(2))

    def _plus(self, base: Tensor, u: Tensor, update: LowRank) -> Tensor:
        return add_product(base, u @ update.down.mT, self.scale * update.up)


class LowRank(nn.Module):
    """Weights of an update ``B A`` for each of S modalities; it starts as zero."""

    def __init__(self, streams: int, width: int, out: int, rank: int, *, exchange: bool = False) -> None:
        super().__init__()
        self.down, self.up = kaiming(streams, rank, width), zeros(streams, out, rank)
        self.mix = nn.Parameter(torch.full((2,), 0.5)) if exchange and streams == 2 else None


def add_product(base: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """base [S B, T, out] plus hidden [S, B T, r] by up [S, out, r]; without gradients in place of base."""
    rows = by_stream(base, len(up))
    if torch.is_grad_enabled():
        return torch.baddbmm(rows, hidden, up.mT).view(base.shape)
    # what a linear map has just given is nobody else's; a copy of it would be half of what the update costs
    return rows.baddbmm_(hidden.to(rows.dtype), up.mT.to(rows.dtype)).view(base.shape)
