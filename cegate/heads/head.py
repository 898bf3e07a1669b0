"""What a head is, and the linear one: features of four layers -> semantic logits and the loss of each sample alone.

Every head takes four maps [B, C, h, w] on the token grid, from a shallow to a deep layer. Any h and w will do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cegate.errors import ConfigError
from cegate.losses import PixelLoss, at_least_float32
from cegate.parts.part import Part
from cegate.resize import resize

FEATURES = 4
"""Maps that a head takes."""


class Head(Part, ABC):
    """What a segmenter asks of its head.

    No head mixes samples: a sample's logits and loss are the same in every batch, which per-sample Fisher scores need.
    """

    adapts = False
    query_width: int | None = None
    """Width of the head's queries, where it has some that another part can give."""
    log_shares: bool = False
    """Whether logits are logarithms of shares: then overlapping windows are averaged as shares."""
    recordable: bool = True
    """Whether loss and gradient are the same work on every batch, and stay on the device."""
    pixel_loss = PixelLoss()
    """What :meth:`loss` is of the logits, where the head has no loss of its own."""

    def take_loss(self, loss: PixelLoss) -> None:
        """Take the loss of a configuration, once, when the head is built."""
        self.pixel_loss = loss

    def link_queries(self) -> None:
        """Make room for queries that come with the features, in place of the head's own (Rein's tokens).

        Raises:
            ConfigError: this head has no queries.
        """
        raise ConfigError(f"{type(self).__name__} has no queries that a refiner could give; use model.head=mask2former")

    @abstractmethod
    def forward(self, features: Sequence[Tensor], size: tuple[int, int], queries: Tensor | None = None) -> Tensor:
        """Logits whose softmax over classes is the class distribution of a pixel.

        Args:
            features: four maps [B, C, h, w], shallow to deep.
            size: (H, W) of the result in pixels.
            queries: [m, query_width] in place of the head's own, where it was linked.

        Returns:
            [B, K, H, W].
        """

    def loss(
        self,
        features: Sequence[Tensor],
        labels: Tensor,
        weights: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Task loss of each sample alone: ``loss(f, y)[b]`` is ``loss(f[b:b+1], y[b:b+1])[0]`` from equal random state.

        Args:
            features: four maps [B, C, h, w], shallow to deep.
            labels: [B, H, W] int64, 0..K-1, or 255 where a pixel does not count.
            weights: [B, H, W] how much each pixel counts; default: 1. A head whose loss is no mean over pixels weighs
                a sample by the mean over its valid ones.
            queries: as in :meth:`forward`.

        Returns:
            [B], float32 or float64; 0 with gradient 0 for a sample without a valid pixel. Here: ``pixel_loss``.
        """
        return self.pixel_loss(self(features, tuple(labels.shape[-2:]), queries), labels, weights)


class LinearHead(Head):
    """A linear probe: each token's four features, every one normalised over its channels, mapped to classes.

    The logits are made on the token grid and upsampled bilinearly (``align_corners=False``); there is no detail finer
    than a token.

    Args:
        channels: C of each of the four maps.
        classes: K.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        # no weights of its own: they would only repeat those of the classifier
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.classifier = nn.Linear(FEATURES * channels, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int], queries: Tensor | None = None) -> Tensor:
        tokens = torch.cat([self.norm(f.permute(0, 2, 3, 1)) for f in features], dim=-1)  # [B, h, w, 4C]
        # wide, or backward would add a token's hundreds of pixels up in half precision on a GPU
        logits = at_least_float32(self.classifier(tokens)).permute(0, 3, 1, 2)
        return resize(logits, size)
