"""Random changes of a training sample, in the usual order: resize, crop, flip, colours, pad. Each is a pure function of
the generator it is given.

Only the part of the picture that ends up in the crop is read and resized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cegate.config import IGNORE, AugmentConfig
from cegate.data.rasters import Window
from cegate.data.sets import Item, SegmentationSet

BRIGHTNESS = 32 / 255
"""Largest shift of brightness."""
CONTRAST = SATURATION = (0.5, 1.5)
"""Range of the factors."""
HUE = 36.0
"""Largest turn of the hue in degrees: 18 steps of the 2-degree scale of 8-bit images."""
_TRIES = 10


@dataclass(frozen=True)
class Crop:
    """A crop of a picture that was resized from `size` to `scaled`, both (H, W)."""

    size: tuple[int, int]
    scaled: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    def window(self) -> Window:
        """The source pixels that the crop depends on."""
        if self.size == self.scaled:
            return Window(self.top, self.left, self.height, self.width)
        rows, _ = _taps(self.size[0], self.scaled[0], self.top, self.height)
        columns, _ = _taps(self.size[1], self.scaled[1], self.left, self.width)
        return Window(int(rows[0, 0]), int(columns[0, 0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)

    def resample_image(self, pixels: np.ndarray) -> np.ndarray:
        """The crop [C, h, w] float32 of the window's pixels [C, H, W], bilinear between pixel centres."""
        rows, row_weight = _taps(self.size[0], self.scaled[0], self.top, self.height)
        columns, column_weight = _taps(self.size[1], self.scaled[1], self.left, self.width)
        if self.size == self.scaled:
            return pixels.copy()
        pixels = _blend(pixels, rows - rows[0, 0], row_weight, axis=1)
        return _blend(pixels, columns - columns[0, 0], column_weight, axis=2)

    def resample_known(self, pixels: np.ndarray) -> np.ndarray:
        """As `resample_image`, of pixels that are NaN where nothing is known: the known neighbours count, and where
        they are less than half, nothing is known."""
        unknown = np.isnan(pixels)
        if self.size == self.scaled or not unknown.any():
            return self.resample_image(pixels)
        weight = self.resample_image((~unknown).astype(np.float32))
        total = self.resample_image(np.where(unknown, np.float32(0), pixels))
        return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight >= 0.5)

    def resample_label(self, label: np.ndarray) -> np.ndarray:
        """The crop [h, w] of the window's label [H, W], nearest neighbour."""
        if self.size == self.scaled:
            return label.copy()
        window = self.window()
        rows = _closest(self.size[0], self.scaled[0], self.top, self.height) - window.top
        columns = _closest(self.size[1], self.scaled[1], self.left, self.width) - window.left
        return label[rows][:, columns]


def _positions(size: int, scaled: int, start: int, count: int) -> np.ndarray:
    """Source coordinates [count] of the centres of resized pixels start..start+count-1; pixel 0 is centred at 0."""
    return (np.arange(start, start + count) + 0.5) * (size / scaled) - 0.5


def _taps(size: int, scaled: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring source pixels [2, count] and the float32 weight [count] of the second."""
    position = np.clip(_positions(size, scaled, start, count), 0, size - 1)
    low = np.floor(position).astype(np.int64)
    return np.stack((low, np.minimum(low + 1, size - 1))), (position - low).astype(np.float32)


def _closest(size: int, scaled: int, start: int, count: int) -> np.ndarray:
    position = np.floor(_positions(size, scaled, start, count) + 0.5).astype(np.int64)
    rows, _ = _taps(size, scaled, start, count)
    return np.clip(position, rows[0], rows[1])


def _blend(pixels: np.ndarray, taps: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    low = pixels.take(taps[0], axis)
    high = pixels.take(taps[1], axis)
    high -= low
    high *= weight[:, None] if axis == 1 else weight
    low += high
    return low


def draw_crop(
    size: tuple[int, int],
    read_label: Callable[[Window], np.ndarray],
    rng: np.random.Generator,
    *,
    crop: int,
    cfg: AugmentConfig,
) -> tuple[Crop, np.ndarray]:
    """Draw a scale, then a crop with labelled pixels in which no class covers too much.

    Args:
        size: (H, W) of the picture.
        read_label: label [h, w] uint8 of a window of it.
        rng: source of chance.
        crop: side of the crop; it is smaller where the resized picture is.
        cfg: `resize` and `max_class_share`; ignored pixels count for no class.

    Returns:
        The crop and its label [h, w] uint8; the last of ten draws where none has an even enough label.
    """
    scale = rng.uniform(*cfg.resize)
    scaled = tuple(max(1, round(side * scale)) for side in size)
    height, width = (min(crop, side) for side in scaled)
    for _ in range(_TRIES):
        top, left = (
            int(rng.integers(0, side - length + 1)) for side, length in zip(scaled, (height, width), strict=True)
        )
        box = Crop(size, scaled, top, left, height, width)
        label = box.resample_label(read_label(box.window()))
        counts = np.bincount(label.ravel(), minlength=256)[:IGNORE]
        if 0 < counts.max() <= cfg.max_class_share * counts.sum():
            break
    return box, label


def augment(item: Item, rng: np.random.Generator, *, crop: int, cfg: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Change a sample at random.

    Args:
        item: image [C, H, W] float32 0..1 with its label, of any size.
        rng: source of chance; equal generators give equal results.
        crop: side of the result in pixels.
        cfg: what is changed and how far.

    Returns:
        image [C, h, w] float32 0..1 and label [h, w] uint8; h and w are the crop, or less where the resized picture is.
        Channels of a second raster move along, but no colour is changed in them, and NaN there stays NaN.
    """
    box, label = draw_crop(item.label.shape, lambda window: item.label[window.slices], rng, crop=crop, cfg=cfg)
    return _finish(_resample(box, item.image[:, *box.window().slices], item.second), label, rng, cfg, item.second)


def augment_from(
    dataset: SegmentationSet, index: int, rng: np.random.Generator, *, crop: int, cfg: AugmentConfig
) -> tuple[np.ndarray, np.ndarray]:
    """As `augment`, but only the part that is needed is read from the set."""
    box, _ = draw_crop(dataset.size(index), lambda window: dataset.read_label(index, window), rng, crop=crop, cfg=cfg)
    part = dataset.read(index, box.window())
    image, label = _resample(box, part.image, part.second), box.resample_label(part.label)
    return _finish(image, label, rng, cfg, part.second)


def _resample(box: Crop, pixels: np.ndarray, second: int) -> np.ndarray:
    if not second:
        return box.resample_image(pixels)
    return np.concatenate((box.resample_image(pixels[:-second]), box.resample_known(pixels[-second:])))


def _finish(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, cfg: AugmentConfig, second: int
) -> tuple[np.ndarray, np.ndarray]:
    if cfg.flip and rng.random() < 0.5:
        image, label = image[:, :, ::-1], label[:, ::-1]
    if cfg.photometric:  # of the image alone: a height has no colour
        bands = len(image) - second
        changed = distort_colours(image[:bands], rng)
        image = np.concatenate((changed, image[bands:])) if second else changed
    return image, label


def fill_up(image: np.ndarray, label: np.ndarray, side: int, second: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Extend a normalised image [C, h, w] to [C, side, side] below and to the right, and its label [h, w] to
    [side, side] with 255: with 0, which is the mean colour as where windows slide, and the last ``second`` channels
    with NaN, for nothing is known there."""
    margins, bands = [(0, side - length) for length in label.shape], len(image) - second
    filled = np.pad(image, [(0, 0), *margins])
    filled[bands:, label.shape[0] :] = filled[bands:, :, label.shape[1] :] = np.nan
    return filled, np.pad(label, margins, constant_values=IGNORE)


def draw_class_mask(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels of half of the classes that a label shows, rounded up: what ClassMix pastes (Olsson et al., WACV 2021).

    Args:
        label: [H, W] class index, or 255 where there is none; such a pixel is never chosen.
        rng: source of chance.

    Returns:
        [H, W] bool.
    """
    present = np.unique(label)
    present = present[present != IGNORE]
    return np.isin(label, rng.choice(present, size=(len(present) + 1) // 2, replace=False))


def distort_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each with probability 0.5; contrast comes before or after the
    colours at random. Saturation and hue are those of the HSV hexcone and only change three-band images.

    Args:
        image: [C, H, W] float32, 0..1; not written to.
        rng: source of chance.

    Returns:
        [C, H, W] float32, 0..1.
    """
    image = np.array(image, np.float32)  # contiguous, and ours
    contrast_first = rng.random() < 0.5
    if rng.random() < 0.5:
        image = _clip(image + np.float32(rng.uniform(-BRIGHTNESS, BRIGHTNESS)))
    if contrast_first:
        image = _distort_contrast(image, rng)
    if len(image) == 3:
        if rng.random() < 0.5:
            image = scale_saturation(image, rng.uniform(*SATURATION))
        if rng.random() < 0.5:
            image = turn_hue(image, rng.uniform(-HUE, HUE))
    return image if contrast_first else _distort_contrast(image, rng)


def _clip(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 1, out=image)


def _distort_contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _clip(image * np.float32(rng.uniform(*CONTRAST))) if rng.random() < 0.5 else image


def scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the HSV saturation of an RGB image [3, H, W], 0..1; it stays at most 1, value and hue are kept."""
    value, low = image.max(0), image.min(0)
    # s = (value - low) / value grows to factor * s, or to 1
    chroma = value - low
    limit = np.divide(value, chroma, out=np.ones_like(value), where=chroma > 0)
    return _clip(value - (value - image) * np.minimum(np.float32(factor), limit))


def turn_hue(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the HSV hue of an RGB image [3, H, W], 0..1, by -60..60 degrees; value and saturation are kept."""
    red, green, blue = image
    value, low = image.max(0), image.min(0)
    chroma = value - low
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.where(  # in sixths of the circle
        value == red,
        (green - blue) / safe,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue += np.float32(degrees / 60)
    turned = np.empty_like(image)
    for band, offset in enumerate((5, 3, 1)):
        # distance of hue + offset from 2 on the circle of 6; hue + offset stays within -1..11
        distance = np.abs(3 - np.abs(np.abs(hue + np.float32(offset - 2)) - 3))
        turned[band] = value - chroma * np.clip(2 - distance, 0, 1)
    return _clip(turned)


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Subtract the mean and divide by the standard deviation of each band.

    Args:
        image: [..., C, H, W] float32, 0..1.
        mean: C means on 0..1, or fewer: the channels after them are a second raster's and stay on 0..1.
        std: as many standard deviations on 0..1.
    """
    lacking = image.shape[-3] - len(mean)
    mean, std = (
        np.asarray((*values, *(rest,) * lacking), np.float32).reshape(-1, 1, 1)
        for values, rest in ((mean, 0.0), (std, 1.0))
    )
    centred = image - mean
    centred /= std
    return centred
