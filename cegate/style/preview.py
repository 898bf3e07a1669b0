"""What injection and masking make of an image, as a picture: the image, wholly styled, styled in blocks, masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cegate.data.writing import write_image
from cegate.errors import DataError
from cegate.masks import BlockMask
from cegate.style.injection import EarthStyleInjection, Region
from cegate.style.networks import StyleModel
from cegate.style.statistics import Covariance, StyleStatistics

TITLES = ("image", "styled", "styled in blocks", "masked")
GAP_PX, TITLE_PX = 6, 18
_HALF = (0.5, 0.5, 0.5)


def preview(
    image: Tensor,
    style: StyleModel,
    statistics: StyleStatistics,
    *,
    rows: int = 3,
    crop: int = 512,
    alpha: float = 0.1,
    covariance: Covariance = "full",
    region: Region = "masked",
    style_ratio: float = 0.1,
    style_block: int = 64,
    ratio: float = 0.7,
    block: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Draw some styles and masks of one image.

    Args:
        image: [3, H, W] float32 in 0..1; its middle is shown, no larger than a crop.
        style, statistics: as in training.
        rows: number of draws, one below the other.
        crop: as data.crop.
        alpha, covariance, region, style_ratio, style_block: of the section style.
        ratio, block: of the section mim.
        seed: of the run.

    Returns:
        [3, h, w] uint8.

    Raises:
        ConfigError: a ratio or block out of range.
        CheckpointError: statistics of other embeddings.
    """
    height, width = (min(side, crop) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    image = image[:, top : top + height, left : left + width]
    # half and half, so that a black border is not taken for filling
    options = {"mean": _HALF, "std": _HALF, "alpha": alpha, "covariance": covariance}
    injection = EarthStyleInjection(style, statistics, region=region, **options)
    everywhere = torch.full((1, 1, height, width), region == "kept")
    blocks = BlockMask(style_ratio, style_block, crop, "style")
    hidden = BlockMask(ratio, block, crop)
    x, lines = (image[None] - 0.5) / 0.5, []
    for number in range(rows):
        drawn = injection.draw(seed, number, [0])
        kept = hidden.draw((height, width), seed, number, [0])
        shown = (
            x,
            injection(x, everywhere, drawn),
            injection(x, blocks.draw((height, width), seed, number, [0]), drawn),
            x * kept,
        )
        lines.append([_pixels(part) for part in shown])
    return _arrange(lines)


def write_preview(path: Path, picture: np.ndarray) -> None:
    """Write a picture as PNG.

    Raises:
        DataError: the path ends in anything else.
    """
    if path.suffix.lower() != ".png":
        raise DataError(f"{path}: a preview is a PNG; give a path that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, picture)


def _pixels(x: Tensor) -> np.ndarray:
    """[1, 3, H, W] in -1..1 -> [H, W, 3] uint8."""
    return ((x[0] * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _arrange(lines: list[list[np.ndarray]]) -> np.ndarray:
    height, width = lines[0][0].shape[:2]
    columns = len(lines[0])
    size = (columns * (width + GAP_PX) - GAP_PX, len(lines) * (height + GAP_PX) - GAP_PX + TITLE_PX)
    sheet = Image.new("RGB", size, "white")
    for row, line in enumerate(lines):
        for column, part in enumerate(line):
            place = column * (width + GAP_PX), TITLE_PX + row * (height + GAP_PX)
            sheet.paste(Image.fromarray(part), place)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES[:columns]):
        draw.text((column * (width + GAP_PX) + 2, 3), title, fill="black")
    return np.asarray(sheet).transpose(2, 0, 1).copy()
