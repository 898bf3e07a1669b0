"""Reader: an image, in memory or in a file, as the normalised rows that a backbone takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cegate.data.rasters import Header, Window, open_image
from cegate.data.scale import EIGHT_BIT, SCALE_SIDE, ValueRange, check_depth, check_scale, has_doubtful_scale, to_unit
from cegate.errors import DataError
from cegate.scenes.mosaic import Strip

RawImage = np.ndarray | str | Path
"""A (bands, H, W) or (H, W, bands) array, masked where it has no data, or an image file."""
_ADVICE = "give the image with the pixels that were learned from, as they were scaled then"
# a TIFF of this many bytes of pixels that holds less than one in so many has no tile that was ever written: deflated,
# LZW'd or Zstandard's tiles of one colour take more
_HOLLOW_BYTES, _HOLLOW_RATIO = 1 << 34, 10_000


class Learned(Protocol):
    """What a reader asks of a `Recipe`."""

    @property
    def bands(self) -> Sequence[int]: ...  # 1-based bands of a file
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...
    @property
    def value_range(self) -> ValueRange | None: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def crop(self) -> int: ...


class Reader:
    """An image that is read from top to bottom, each row once.

    Attributes:
        name: names it in messages.
        size: (H, W).
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        dtype: str,
        pixels: Callable[[Window], np.ndarray],
        without_data: Callable[[Window], np.ndarray | None],
        learned: Learned,
    ) -> None:
        self.name, self.size, self._pixels, self._without_data = name, size, pixels, without_data
        self._range = learned.value_range or [EIGHT_BIT] * len(learned.bands)
        check_depth(dtype, self._range, name, _ADVICE)
        if has_doubtful_scale(dtype, self._range):
            check_scale(pixels(Window.middle_of(size, SCALE_SIDE)), self._range, name, _ADVICE)
        self._has_nan = dtype.startswith("float")
        self._mean, self._std = (np.array(x, np.float32).reshape(-1, 1, 1) for x in (learned.mean, learned.std))

    def read(self, first: int, last: int) -> Strip:
        """Rows first..last-1, normalised.

        A pixel is empty where a band is NaN or infinite, or the image says that it has no data. The former is given as
        black, the latter as it is stored, both as in training.

        Raises:
            DataError: they cannot be read.
        """
        window = Window(first, 0, last - first, self.size[1])
        unit, gaps = to_unit(self._pixels(window), self._range)
        empty = self._without_data(window)
        if self._has_nan:
            empty = gaps if empty is None else gaps | empty
        unit -= self._mean
        unit /= self._std
        return Strip(torch.from_numpy(unit), empty)


@contextmanager
def open_reader(image: RawImage, learned: Learned, *, all_pixels: bool = False) -> Iterator[Reader]:
    """Open an image for weights that learned from its like.

    Args:
        image: array or file.
        learned: the bands that are read, how their pixels become 0..1 and are normalised, and the side of a window.
        all_pixels: pixels that the image calls without data are pixels like any other.

    Raises:
        DataError: a file is missing, damaged, or too wide for this machine, bands are missing, or pixels are of another
            depth or scale.
    """
    if not isinstance(image, str | Path):
        given = _bands_first(np.asanyarray(image), len(learned.bands))
        pixels, masked = np.asarray(given), None
        if np.ma.is_masked(given) and not all_pixels:
            masked = given.mask.all(axis=0)
        read = lambda part: pixels[:, *part.slices]  # noqa: E731
        without_data = lambda part: None if masked is None else masked[part.slices]  # noqa: E731
        yield Reader("image", pixels.shape[1:], str(pixels.dtype), read, without_data, learned)
        return
    with open_image(image) as file, file.read_once():
        header, bands = file.header, learned.bands
        if max(bands) > header.bands:
            raise DataError(
                f"{image} has {header.bands} bands, the model reads the bands {', '.join(map(str, bands))}; give "
                "images that have them"
            )
        dtype = file.dtype_of(bands)
        _refuse_hollow(image, header)
        _refuse_too_wide(image, header, dtype, learned)
        read = lambda part: file.read(bands, window=part)  # noqa: E731
        without_data = lambda part: None if all_pixels else file.without_data(window=part)  # noqa: E731
        yield Reader(str(image), header.size, dtype, read, without_data, learned)


def _bands_first(image: np.ndarray, bands: int) -> np.ndarray:
    if image.ndim == 3 and image.shape[0] == bands:
        return image
    if image.ndim == 3 and image.shape[-1] == bands:
        return np.moveaxis(image, -1, 0)
    raise DataError(f"image has shape {image.shape}; the model takes ({bands}, H, W) or (H, W, {bands})")


def _refuse_hollow(image: str | Path, header: Header) -> None:
    """A TIFF of a few megabytes may promise terabytes of tiles that were never written: days of work on nothing."""
    promised = header.height * header.width * header.bands * np.dtype(header.dtype).itemsize
    if promised < _HOLLOW_BYTES or Path(image).suffix.lower() not in (".tif", ".tiff"):
        return
    if promised > _HOLLOW_RATIO * (held := Path(image).stat().st_size):
        raise DataError(
            f"{image} is {header.width}x{header.height} pixels by its header, {_bytes(promised)}, but the file holds "
            f"{_bytes(held)}: nearly all of it was never written; cut out the part that has pixels"
        )


def _refuse_too_wide(image: str | Path, header: Header, dtype: str, learned: Learned) -> None:
    """The least that one row of windows takes: its pixels as stored and normalised, its logits and their sums."""
    of_pixel = len(learned.bands) * (np.dtype(dtype).itemsize + 4) + 2 * 4 * len(learned.classes)
    needed, free = header.width * learned.crop * of_pixel, _free_memory()
    if needed > free:
        raise DataError(
            f"{image} is {header.width}x{header.height} pixels: a row of windows takes {_bytes(needed)}, and "
            f"{_bytes(free)} of memory are free; cut it into parts that are less wide"
        )


def _free_memory() -> int:
    """Bytes that this process may still take, by the system and by its control group."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        with suppress(OSError, ValueError):  # "max" where there is no limit
            free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return free
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
