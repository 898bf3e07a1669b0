"""Sliding windows of a whole image: together, as the device asks for, beside one by one."""

from __future__ import annotations

import pytest
import torch
from models import SIZES, make_segmenter
from side_by_side import side_by_side

from cegate.scenes.mosaic import Mosaic, Pixels, windows_at_once

SIDE = 400


def slide(segmenter: torch.nn.Module, image: torch.Tensor, crop: int, batch: int | None = None) -> torch.Tensor:
    """Logits [K, H, W] of a whole image [1, C, H, W]."""
    rows = Mosaic(crop, batch=batch).rows(segmenter, Pixels(image[0]))
    return torch.cat([part.logits for part in rows], dim=1)


@pytest.mark.parametrize("crop", [128, 224])
def bench_windows_of_an_image_on_the_cpu(benchmark, crop):
    segmenter = make_segmenter(SIZES["vit_t"]._replace(pixels=crop)).eval()
    image = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        logits = side_by_side(
            benchmark,
            lambda: slide(segmenter, image, crop),
            {"one by one": lambda: slide(segmenter, image, crop, batch=1)},
            target={"one by one": "< 1"} if windows_at_once(image.device, crop) > 1 else None,
        )
        torch.testing.assert_close(logits, slide(segmenter, image, crop, batch=1), rtol=1e-4, atol=1e-4)
