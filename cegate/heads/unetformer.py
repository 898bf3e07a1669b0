"""UNetFormer's decoder: a pyramid of features, or one map, to pixels.

Source: Wang et al., UNetFormer, ISPRS Journal 190 (2022) 196-214; with the widths of MFNet (arXiv:2410.11160).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.errors import ConfigError
from cegate.heads.head import Head
from cegate.losses import at_least_float32
from cegate.resize import resize

EPS = 1e-8


class UNetFormerHead(Head):
    """From the coarsest map upwards: attention, then a weighted fusion with the next finer map, three times over.

    BatchNorm makes the samples of a batch depend on each other in train mode; in evaluation mode, in which Fisher
    scores are measured, none does.

    Args:
        channels: C of each map.
        classes: K.
        skips: take four maps, each of half the side of the one before (a neck's pyramid); otherwise the last map alone,
            and every fusion is an upsampling.
        width: of the decoder; a multiple of ``heads``.
        heads: of the attention.
        window: side of its windows.
        dropout: of whole channels before the classifier.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        skips: bool = True,
        width: int = 64,
        heads: int = 8,
        window: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"width={width} of the decoder is not a multiple of its {heads} attention heads")
        self.skips, skip = skips, channels if skips else None
        self.start = conv_norm(channels, width, 1)
        self.blocks = nn.ModuleList(GlobalLocalBlock(width, heads, window) for _ in range(3))
        self.fusions = nn.ModuleList([*(Fusion(width, skip) for _ in range(2)), Refinement(width, skip)])
        self.classifier = nn.Sequential(
            conv_norm_relu(width, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1, bias=False)
        )

    def forward(self, features: Sequence[Tensor], size: tuple[int, int], queries: Tensor | None = None) -> Tensor:
        """Logits [B, K, H, W] of the maps, fine to coarse."""
        *finer, z = self._checked(features)
        z = self.start(z)
        for block, fuse in zip(self.blocks, self.fusions, strict=True):
            z = fuse(block(z), finer.pop() if self.skips else None)
        logits = at_least_float32(self.classifier(z))
        return resize(logits, size)

    def _checked(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.skips:
            return features[-1:]
        sides = [tuple(f.shape[-2:]) for f in features]
        halves = [tuple(-(-side // 2) for side in finer) for finer in sides[:-1]]
        if len(sides) != 4 or halves != sides[1:]:
            raise ConfigError(
                f"model.head=unetformer takes four maps, each of half the side of the one before, not {sides}; set "
                "modal.fusion=dfm, which makes them, or take another head"
            )
        return features


# convolutions --------------------------------------------------------------------------------------------------------


def conv_norm(width: int, out: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, side, padding=side // 2, bias=False), nn.BatchNorm2d(out))


def conv_norm_relu(width: int, out: int, side: int) -> nn.Sequential:
    return conv_norm(width, out, side).append(nn.ReLU6())


def separable(width: int, side: int, padding: int) -> nn.Sequential:
    """Depthwise convolution, norm, pointwise convolution."""
    depthwise = nn.Conv2d(width, width, side, padding=padding, groups=width, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(width), nn.Conv2d(width, width, 1, bias=False))


# attention -----------------------------------------------------------------------------------------------------------


class GlobalLocalBlock(nn.Module):
    """``z += attention(norm z)``, ``z += mlp(norm z)`` on a map [B, C, H, W]."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.attention = GlobalLocalAttention(width, heads, window)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.ReLU6(), nn.Conv2d(4 * width, width, 1))

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attention(self.norm1(z))
        return z + self.mlp(self.norm2(z))


class GlobalLocalAttention(nn.Module):
    """Attention within windows, spread over them by means along rows and columns, beside two convolutions."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.local3, self.local1 = conv_norm(width, width, 3), conv_norm(width, width, 1)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, heads), std=0.02))
        self.project = separable(width, window, window // 2 - 1)
        place = torch.arange(window)
        step = place[:, None] - place + window - 1  # query - key
        index = step[:, None, :, None] * (2 * window - 1) + step[None, :, None, :]
        self.register_buffer("index", index.reshape(window**2, window**2), persistent=False)

    def no_weight_decay(self) -> set[str]:
        return {"position"}

    def forward(self, z: Tensor) -> Tensor:
        height, width = z.shape[-2:]
        window, middle = self.window, self.window // 2 - 1
        a = self._attend(z)[..., :height, :width]
        down = F.avg_pool2d(extend(a, 1, 0), (window, 1), stride=1, padding=(middle, 0))
        across = F.avg_pool2d(extend(a, 0, 1), (1, window), stride=1, padding=(0, middle))
        a = down + across + self.local3(z) + self.local1(z)
        return self.project(extend(a, 1, 1))[..., :height, :width]

    def _attend(self, z: Tensor) -> Tensor:
        """Within windows; the map is extended to whole ones."""
        side = self.window
        z = extend(z, -z.shape[-2] % side, -z.shape[-1] % side)
        down, across = z.shape[-2] // side, z.shape[-1] // side
        qkv = self.qkv(z).unflatten(3, (across, side)).unflatten(2, (down, side)).unflatten(1, (3, self.heads, -1))
        # [3, B, down, across, heads, side, side, d] -> [B windows, heads, tokens, d] each
        q, k, v = qkv.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6).flatten(1, 3).unbind(0)
        bias = self.position[self.index].permute(2, 0, 1).to(q.dtype)  # [heads, tokens, tokens]
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        a = a.unflatten(2, (side, side)).unflatten(0, (-1, down, across))
        return a.permute(0, 3, 6, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def extend(z: Tensor, below: int, right: int) -> Tensor:
    """A map with more rows and columns: mirrored ones, or the last one again where it is too small for a mirror."""
    for rows, columns in ((below, 0), (0, right)):
        if rows or columns:
            mirrored = rows < z.shape[-2] and columns < z.shape[-1]
            z = F.pad(z, (0, columns, 0, rows), mode="reflect" if mirrored else "replicate")
    return z


# fusion --------------------------------------------------------------------------------------------------------------


class Fusion(nn.Module):
    """A map, upsampled to a finer one and averaged with it by two learned weights.

    Args:
        width: channels of the map.
        skip: channels of the finer one; None: there is none, and the map's side is doubled.
    """

    def __init__(self, width: int, skip: int | None) -> None:
        super().__init__()
        if skip is not None:
            self.skip = nn.Conv2d(skip, width, 1, bias=False)
            self.weights = nn.Parameter(torch.ones(2))
        self.smooth = conv_norm_relu(width, width, 3)

    def forward(self, z: Tensor, finer: Tensor | None) -> Tensor:
        size = tuple(2 * side for side in z.shape[-2:]) if finer is None else finer.shape[-2:]
        z = resize(z, size)
        if finer is not None:
            share = self.weights.relu()
            share = share / (share.sum() + EPS)
            z = share[0] * self.skip(finer) + share[1] * z
        return self.smooth(z)


class Refinement(Fusion):
    """A fusion whose result u is weighed by place and by channel, beside a shortcut."""

    def __init__(self, width: int, skip: int | None) -> None:
        super().__init__(width, skip)
        self.place = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.squeeze, self.excite = (
            nn.Conv2d(width, width // 16, 1, bias=False),
            nn.Conv2d(width // 16, width, 1, bias=False),
        )
        self.shortcut = conv_norm(width, width, 1)
        self.project = separable(width, 3, 1)

    def forward(self, z: Tensor, finer: Tensor | None) -> Tensor:
        u = super().forward(z, finer)
        channel = self.excite(F.relu6(self.squeeze(u.mean((2, 3), keepdim=True))))
        weighed = u * (self.place(u).sigmoid() + channel.sigmoid())
        return F.relu6(self.project(weighed) + self.shortcut(u))
