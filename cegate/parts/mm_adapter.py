"""MMAdapter: bottleneck adapters of two modalities that share a frozen transformer (MFNet).

Source: Ma et al., A Unified Framework with Multimodal Fine-tuning for Remote Sensing Semantic Segmentation, IEEE TGRS
2025 (arXiv:2410.11160), Eq. 3-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.backbone.backbone import Backbone
from cegate.backbone.ports import Plug, Tokens
from cegate.parts.part import Part, kaiming, zeros

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
"""GELU is what the published code has, ReLU what the paper says."""
SINGLE_SCALE = 0.5
"""Of the adapter beside the MLP where there is one modality."""
ORDER = 50
"""At a port: after the sites of a toolbox, before Rein."""


class MMAdapter(Part):
    """Two adapters a block and modality: one after attention, one beside the MLP, where modalities exchange.

    With f and g bottlenecks ``up(act(down z))``, h the MLP's input, n the other modality of m, and ``mix`` the learned
    share of a modality's own adapter::

        a_m <- a_m + f_m(a_m)
        y_m <- y_m + mix_m g_m(h_m) + (1 - mix_m) g_n(h_n)

    One modality alone: ``y <- y + 0.5 g(h)``. Two that do not exchange have no g, as in the ablation of the published
    code. The modalities lie behind each other in the batch, so that one product serves both.

    Args:
        depth: blocks of the backbone.
        width: channels C of its stream.
        streams: modalities, 1 or 2.
        exchange: whether two modalities exchange.
        ratio: width of the bottleneck by C.
        activation: gelu or relu.
        zero_init: start as the frozen backbone; published: as ``nn.Linear`` draws its weights.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        streams: int = 2,
        exchange: bool = True,
        ratio: float = 0.25,
        activation: str = "gelu",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.streams, self.layers = streams, nn.ModuleList()
        for _ in range(depth):
            layer = nn.Module()
            layer.attention = Bottlenecks(streams, width, int(width * ratio), activation, zero_init)
            if exchange or streams == 1:
                layer.mlp = Bottlenecks(streams, width, int(width * ratio), activation, zero_init)
            if exchange and streams == 2:
                layer.mix = nn.Parameter(torch.full((2,), 0.5))
            self.layers.append(layer)

    @classmethod
    def build(cls, backbone: Backbone, **options: object) -> MMAdapter:
        """For the blocks of a backbone."""
        return cls(backbone.depth, backbone.width, **options)

    def plugs(self) -> Iterable[Plug]:
        for n, layer in enumerate(self.layers):
            yield Plug("attention", n, ORDER, partial(self._after_attention, layer))
            if hasattr(layer, "mlp"):
                yield Plug("mlp", n, ORDER, partial(self._beside_mlp, layer))

    def _after_attention(self, layer: nn.Module, a: Tensor, tokens: Tokens) -> Tensor:
        """a [S B, T, C]."""
        return a + layer.attention(by_stream(a, self.streams)).view(a.shape)

    def _beside_mlp(self, layer: nn.Module, x1: Tensor, h: Tensor, y: Tensor, tokens: Tokens) -> Tensor:
        """h and y [S B, T, C]: the MLP's input, and the stream behind it."""
        added = layer.mlp(by_stream(h, self.streams))  # [S, B T, C]
        if self.streams == 1:
            return y + SINGLE_SCALE * added.view(y.shape)
        return y + (exchange_matrix(layer.mix) @ added.flatten(1)).view(y.shape)


class Bottlenecks(nn.Module):
    """``up(act(down z))`` for each of S modalities by its own weights, as one product each."""

    def __init__(self, streams: int, width: int, inner: int, activation: str, zero_init: bool) -> None:
        super().__init__()
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]
        self.down, self.down_bias = kaiming(streams, inner, width), _bias(streams, inner, width)
        if zero_init:
            self.up, self.up_bias = zeros(streams, width, inner), zeros(streams, width)
        else:
            self.up, self.up_bias = kaiming(streams, width, inner), _bias(streams, width, inner)

    def no_weight_decay(self) -> set[str]:
        return {"down_bias", "up_bias"}

    def forward(self, z: Tensor) -> Tensor:
        """[S, N, C] -> [S, N, C]."""
        hidden = self.activation(torch.baddbmm(self.down_bias[:, None], z, self.down.mT))
        return torch.baddbmm(self.up_bias[:, None], hidden, self.up.mT)


def _bias(streams: int, out: int, fan_in: int) -> nn.Parameter:
    """Biases as ``nn.Linear`` draws them."""
    return nn.Parameter(torch.empty(streams, out).uniform_(-(fan_in**-0.5), fan_in**-0.5))


def by_stream(x: Tensor, streams: int) -> Tensor:
    """[S B, T, C], modalities behind each other, as [S, B T, C]."""
    return x.reshape(streams, -1, x.shape[-1])


def exchange_matrix(mix: Tensor) -> Tensor:
    """[2, 2]: row m says how much of each modality's own goes to m; ``mix`` [2] is the share that stays."""
    return torch.diag(mix) + torch.diag(1 - mix).flip(1)
