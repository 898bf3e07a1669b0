"""The style transfer network (Ghiasi et al., arXiv:1705.06830): an image and a style embedding -> the image in that
style. An embedding gives the scale and shift of every instance normalisation but the first three."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.style.predictor import DIM

STEP_PX = 4
"""H and W are multiples of it."""


class StyleTransfer(nn.Module):
    """Images [B, 3, H, W] in 0..1 and embeddings [B, 100] -> images of the same size in (0, 1); 1,954,593 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                _Plain(3, 32, 9, stride=1),
                _Plain(32, 64, 3, stride=2),
                _Plain(64, 128, 3, stride=2),
                *(_Residual(128) for _ in range(5)),
                _Styled(128, 64, 3, upsample=True),
                _Styled(64, 32, 3, upsample=True),
                _Styled(32, 3, 9, last=True),
            ]
        )

    def forward(self, image: Tensor, embedding: Tensor) -> Tensor:
        x = image
        for layer in self.layers:
            x = layer(x, embedding)
        return x.sigmoid()


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, padding_mode="reflect")


def _restyle(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Instance normalisation of [B, C, H, W] with scale and shift [B, C] of each sample's style."""
    return gamma[:, :, None, None] * F.instance_norm(x) + beta[:, :, None, None]


class _Plain(nn.Module):
    """Convolution, instance normalisation, ReLU; no style."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = _convolution(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.instance_norm(self.conv(x)).relu()


class _Residual(nn.Module):
    """Two styled convolutions beside a skip; nothing after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _convolution(channels, channels, 3), _convolution(channels, channels, 3)
        self.fc_beta1, self.fc_gamma1 = nn.Linear(DIM, channels), nn.Linear(DIM, channels)
        self.fc_beta2, self.fc_gamma2 = nn.Linear(DIM, channels), nn.Linear(DIM, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = _restyle(self.conv1(x), self.fc_gamma1(embedding), self.fc_beta1(embedding)).relu()
        return x + _restyle(self.conv2(y), self.fc_gamma2(embedding), self.fc_beta2(embedding))


class _Styled(nn.Module):
    """A styled convolution, on an image of twice the size where it upsamples; ReLU but for the last."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, upsample: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.upsample, self.last = upsample, last
        self.conv = _convolution(in_channels, out_channels, kernel)
        self.fc_beta, self.fc_gamma = nn.Linear(DIM, out_channels), nn.Linear(DIM, out_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        y = _restyle(self.conv(x), self.fc_gamma(embedding), self.fc_beta(embedding))
        return y if self.last else torch.relu(y)
