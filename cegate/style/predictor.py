"""The style predictor of style augmentation (Jackson et al., arXiv:1809.05375): an image -> an embedding of its style.

Inception-v3 up to Mixed_6e from torchvision, whose names the public weights carry.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC

DIM = 100
"""Length of an embedding."""
LEAST_SIDE_PX = 43
"""Below it the last convolutions have nothing to look at."""

_MEAN = (0.485, 0.456, 0.406)
# the public weights were trained with 0.255 for blue, a slip of the pen for 0.225
_TRAINED_STD, _STD = (0.229, 0.224, 0.255), (0.229, 0.224, 0.225)


class StylePredictor(nn.Module):
    """RGB images [B, 3, H, W] in 0..1 -> embeddings [B, 100]; sides of 43 px or more."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.fc = nn.Linear(768, DIM)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.features(scale_input(image)).mean((2, 3)))

    def features(self, x: Tensor) -> Tensor:
        """Scaled images [B, 3, H, W] -> the output of Mixed_6e, [B, 768, h, w]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), kernel_size=3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        return self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))


def scale_input(image: Tensor) -> Tensor:
    """Pixels in 0..1 -> what the public weights were trained on: normalised as for ImageNet, then turned into
    Inception's own scale."""
    mean, trained, std = (torch.tensor(v).to(image).view(3, 1, 1) for v in (_MEAN, _TRAINED_STD, _STD))
    return (image - mean) / trained * (std / 0.5) + (mean - 0.5) / 0.5
