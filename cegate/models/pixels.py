"""Raw images, in memory or in files, as the normalised rows that a backbone takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cegate.data.rasters import Window, open_image
from cegate.data.scale import EIGHT_BIT, SCALE_SIDE, ValueRange, check_depth, check_scale, has_doubtful_scale, to_unit
from cegate.data.transforms import normalise
from cegate.errors import DataError

RawImage = np.ndarray | str | Path
"""A (bands, H, W) or (H, W, bands) array, masked where it has no data, or an image file."""
_ADVICE = "give the image with the pixels that were learned from, as they were scaled then"


class Learned(Protocol):
    """What the weights that will see an image know of its bands."""

    @property
    def bands(self) -> Sequence[int]:
        """1-based bands of a file."""

    mean: Sequence[float]
    std: Sequence[float]
    value_range: ValueRange | None


class Source:
    """An image, read from top to bottom.

    Attributes:
        name: names it in messages.
        size: (H, W).
        empty: [H, W] bool, of the rows that were read: where a band is NaN or infinite, or the image says that it has
            no data. The former is given as black, the latter as it is stored, both as in training. None where the
            image can have neither.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        dtype: str,
        read: Callable[[Window], np.ndarray],
        without_data: Callable[[Window], np.ndarray | None],
        learned: Learned,
    ) -> None:
        self.name, self.size, self._read, self._without_data = name, size, read, without_data
        self._range = learned.value_range or [EIGHT_BIT] * len(learned.bands)
        check_depth(dtype, self._range, name, _ADVICE)
        if has_doubtful_scale(dtype, self._range):
            check_scale(read(Window.middle_of(size, SCALE_SIDE)), self._range, name, _ADVICE)
        self.empty = np.zeros(size, bool) if dtype.startswith("float") else None
        self._mean, self._std = learned.mean, learned.std

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of the image, normalised float32 [bands, last - first, W].

        Raises:
            DataError: they cannot be read.
        """
        window = Window(first, 0, last - first, self.size[1])
        unit, gaps = to_unit(self._read(window), self._range)
        without_data = self._without_data(window)
        if self.empty is None and without_data is not None:
            self.empty = np.zeros(self.size, bool)
        if self.empty is not None:
            self.empty[first:last] = gaps if without_data is None else gaps | without_data
        return torch.from_numpy(normalise(unit[None], self._mean, self._std)[0])


@contextmanager
def open_source(image: RawImage, learned: Learned, *, all_pixels: bool = False) -> Iterator[Source]:
    """Open an image for weights that learned from its like.

    Args:
        image: array or file.
        learned: the bands that are read, and how their pixels become 0..1 and are normalised.
        all_pixels: pixels that the image calls without data are pixels like any other.

    Raises:
        DataError: a file is missing or damaged, bands are missing, or pixels are of another depth or scale.
    """
    if not isinstance(image, str | Path):
        given = _bands_first(np.asanyarray(image), len(learned.bands))
        pixels, masked = np.asarray(given), None
        if np.ma.is_masked(given) and not all_pixels:
            masked = given.mask.all(axis=0)
        read = lambda part: pixels[:, *part.slices]  # noqa: E731
        without_data = lambda part: None if masked is None else masked[part.slices]  # noqa: E731
        yield Source("image", pixels.shape[1:], str(pixels.dtype), read, without_data, learned)
        return
    with open_image(image) as file:
        header, bands = file.header, learned.bands
        if max(bands) > header.bands:
            raise DataError(
                f"{image} has {header.bands} bands, the model reads the bands {', '.join(map(str, bands))}; give "
                "images that have them"
            )
        read = lambda part: file.read(bands, window=part)  # noqa: E731
        without_data = lambda part: None if all_pixels else file.without_data(window=part)  # noqa: E731
        yield Source(str(image), header.size, header.dtype, read, without_data, learned)


def _bands_first(image: np.ndarray, bands: int) -> np.ndarray:
    if image.ndim == 3 and image.shape[0] == bands:
        return image
    if image.ndim == 3 and image.shape[-1] == bands:
        return np.moveaxis(image, -1, 0)
    raise DataError(f"image has shape {image.shape}; the model takes ({bands}, H, W) or (H, W, {bands})")
