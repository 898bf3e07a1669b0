"""Models and batches that several benchmarks share; random weights, since only time is asked."""

from __future__ import annotations

import torch

from cegate.config import Config, DataConfig, GateConfig, ModelConfig
from cegate.models.segmenter import Segmenter, build

CLASSES = [f"class{index}" for index in range(6)]

# name: timm model, patch, pixels, batch
SIZES = {
    "vit_t": ("vit_tiny_patch16_224", 16, 224, 4),
    "vit_l": ("vit_large_patch14_dinov2", 16, 256, 1),
}


def make_segmenter(size: str, head: str = "linear") -> Segmenter:
    """A segmenter with gates off."""
    name, patch, pixels, _ = SIZES[size]
    config = Config(
        data=DataConfig(classes=CLASSES, crop=pixels),
        model=ModelConfig(backbone=name, weights="none", patch_size=patch, head=head),
        gate=GateConfig(method="none"),
    )
    return build(config)


def make_batch(size: str, samples: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [B, 3, H, W] and labels [B, H, W]."""
    _, _, pixels, batch = SIZES[size]
    batch = samples or batch
    return torch.randn(batch, 3, pixels, pixels), torch.randint(0, len(CLASSES), (batch, pixels, pixels))
