"""Models and batches that several benchmarks share; random weights, since only time is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from cegate.config import Config, DataConfig, GateConfig, ModelConfig
from cegate.segmenter import Segmenter, build

CLASSES = [f"class{index}" for index in range(6)]


class Size(NamedTuple):
    """A backbone and what it is given."""

    backbone: str
    patch: int
    pixels: int
    batch: int


SIZES = {
    "vit_t": Size("vit_tiny_patch16_224", 16, 224, 4),
    "vit_l": Size("vit_large_patch14_dinov2", 16, 256, 1),
}
VIT_L_512 = Size("vit_large_patch14_dinov2", 16, 512, 4)
"""What the paper trains: DINOv2-L, crops of 512 pixels, four at a time."""


@dataclass
class Probe:
    """A batch to be scored."""

    image: torch.Tensor
    label: torch.Tensor


def make_segmenter(size: str | Size, head: str = "linear") -> Segmenter:
    """A segmenter with gates off; equal sizes give equal weights."""
    size = SIZES[size] if isinstance(size, str) else size
    config = Config(
        data=DataConfig(classes=CLASSES, crop=size.pixels),
        model=ModelConfig(backbone=size.backbone, weights="none", patch_size=size.patch, head=head),
        gate=GateConfig(method="none"),
    )
    return build(config)


def make_batch(size: str | Size, samples: int | None = None, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [B, 3, H, W] and labels [B, H, W]."""
    size = SIZES[size] if isinstance(size, str) else size
    shape = (samples or size.batch, size.pixels, size.pixels)
    images = torch.randn(shape[0], 3, *shape[1:], device=device)
    return images, torch.randint(0, len(CLASSES), shape, device=device)


def perturb(model: Segmenter) -> Segmenter:
    """Move every module away from its start, where half of the gradients are zero."""
    with torch.no_grad():
        for parameter in model.toolbox.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 as in training."""
    return torch.autocast(device, torch.bfloat16)
