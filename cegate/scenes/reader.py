"""Reader: an image, in memory or in a file, as the normalised rows that a backbone takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import rasterio
import torch
from rasterio.env import getenv, hasenv

from cegate.data.rasters import DEFAULT_BANDS, Header, Window, open_image, read_header, refuse_hollow
from cegate.data.scale import (
    EIGHT_BIT,
    SCALE_SIDE,
    ValueRange,
    check_depth,
    check_scale,
    has_doubtful_scale,
    is_measured,
    to_unit,
)
from cegate.data.second import epsilon_of, open_second, refuse_surplus, scaled, unknown
from cegate.errors import DataError, bytes_text
from cegate.recipe import SecondRecipe
from cegate.scenes.mosaic import Strip

RawImage = np.ndarray | torch.Tensor | str | Path
"""A (bands, H, W) or (H, W, bands) array or tensor, a masked array where it has no data, or an image file."""
_ADVICE = "give the image with the pixels that were learned from, as they were scaled then"
_GIVE = "give an array or a tensor of real numbers, or the path of a file; of bytes, numpy.asarray(PIL.Image.open(...))"
_NOT_NUMPYS = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}


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
    @property
    def second(self) -> SecondRecipe | None: ...


WORTH_SAYING = 0.01
"""Share of an image whose second raster is unknown: elevation has holes, and borders that warping loses."""
Pixels = Callable[[Window], np.ndarray]
"""[C, h, w] of a window."""


class Reader:
    """An image that is read from top to bottom, each row once.

    Attributes:
        name: names it in messages.
        size: (H, W).
        unread: what is to be said of bands that are not read; "" where nothing is.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        dtype: str,
        pixels: Pixels,
        without_data: Callable[[Window], np.ndarray | None],
        learned: Learned,
        second: Pixels | None = None,
        *,
        unread: str = "",
    ) -> None:
        self.name, self.size, self._pixels, self._without_data = name, size, pixels, without_data
        self._second, self.unread, self._lacking = second, unread, 0
        self._gdal = _gdal_as_here()
        self._range = learned.value_range or [EIGHT_BIT] * len(learned.bands)
        check_depth(dtype, self._range, name, _ADVICE)
        if has_doubtful_scale(dtype, self._range):
            check_scale(pixels(Window.middle_of(size, SCALE_SIDE)), self._range, name, _ADVICE)
        self._has_nan = dtype.startswith("float")
        self._mean, self._std = (np.array(x, np.float32).reshape(-1, 1, 1) for x in (learned.mean, learned.std))

    def read(self, first: int, last: int) -> Strip:
        """Rows first..last-1, normalised; channels of a second raster come last, 0..1, and are NaN where it is unknown.

        A pixel is empty where a band is NaN or infinite, or the image says that it has no data. The former is given as
        black, the latter as it is stored, both as in training.

        Raises:
            DataError: they cannot be read.
        """
        window = Window(first, 0, last - first, self.size[1])
        with self._gdal():
            pixels, empty = self._pixels(window), self._without_data(window)
            further = None if self._second is None else self._second(window)
        unit, gaps = to_unit(pixels, self._range)
        if self._has_nan:
            empty = gaps if empty is None else gaps | empty
        unit -= self._mean
        unit /= self._std
        if further is not None:
            nowhere = np.isnan(further).all(0)
            self._lacking += int(nowhere.sum() if empty is None else (nowhere & ~empty).sum())
            unit = np.concatenate((unit, further))
        return Strip(torch.from_numpy(unit), empty)

    @property
    def lacking(self) -> float:
        """Share of the image, 0..1, where its second raster is unknown, of what was read so far."""
        return self._lacking / max(self.size[0] * self.size[1], 1)


class SecondAlone:
    """A second raster whose image is missing, as a reader: a pixel is empty where it is unknown."""

    unread, lacking = "", 0.0

    def __init__(self, name: str, size: tuple[int, int], pixels: Pixels, bands: int) -> None:
        self.name, self.size, self._pixels, self._bands = name, size, pixels, bands
        self._gdal = _gdal_as_here()

    def read(self, first: int, last: int) -> Strip:
        """Rows first..last-1; the image's channels are NaN."""
        with self._gdal():
            known = self._pixels(Window(first, 0, last - first, self.size[1]))
        nothing = unknown(self._bands, known.shape[1:])
        return Strip(torch.from_numpy(np.concatenate((nothing, known))), np.isnan(known).all(0))


def _gdal_as_here() -> Callable[[], AbstractContextManager[object]]:
    """What gives another thread GDAL's options of this one, of which rasterio keeps some for each thread."""
    if not hasenv():
        return nullcontext
    options = {name: value for name, value in getenv().items() if name != "GDAL_CACHEMAX"}  # that is the process's
    return partial(rasterio.Env, **options)


@contextmanager
def open_reader(
    image: RawImage | None, learned: Learned, *, second: RawImage | None = None, all_pixels: bool = False
) -> Iterator[Reader | SecondAlone]:
    """Open an image for weights that learned from its like.

    Args:
        image: array or file; None where weights that learned to do without it are given the second raster alone.
        learned: the bands that are read, how their pixels become 0..1 and are normalised, and the side of a window.
        second: the second raster, for weights that learned from two: a file, on any grid, or an array of the image's
            size. None where they learned to do without.
        all_pixels: pixels that the image calls without data are pixels like any other.

    Raises:
        DataError: a file is missing, damaged, or too wide for this machine, bands are missing, or pixels are of another
            depth or scale; a raster that the weights need is missing, or does not lie where the image does.
    """
    check_rasters(learned, image=image is not None, second=second is not None)
    if image is None:
        with open_second_pixels(second, learned.second, None) as (size, pixels):
            name = str(second) if isinstance(second, str | Path) else "second raster"
            yield SecondAlone(name, size, pixels, len(learned.bands))
        return
    if not isinstance(image, str | Path):
        given = _bands_first(_array_of(image), len(learned.bands))
        pixels, masked = np.asarray(given), None
        if np.ma.is_masked(given) and not all_pixels:
            masked = given.mask.all(axis=0)
        read = lambda part: pixels[:, *part.slices]  # noqa: E731
        without_data = lambda part: None if masked is None else masked[part.slices]  # noqa: E731
        header = Header(*pixels.shape[1:], len(pixels), str(pixels.dtype))
        with _second_beside(header, learned, second) as further:
            yield Reader("image", header.size, header.dtype, read, without_data, learned, further)
        return
    with open_image(image) as file, file.read_once():
        header, bands = file.header, learned.bands
        if max(bands) > header.bands:
            raise DataError(
                f"{image} has {header.bands} bands, the model reads the bands {', '.join(map(str, bands))}; give "
                "images that have them"
            )
        dtype = file.dtype_of(bands)
        _refuse_itself(image, second, learned)
        refuse_hollow(image, header)
        _refuse_too_wide(image, header, dtype, learned)
        read = lambda part: file.read(bands, window=part)  # noqa: E731
        without_data = lambda part: None if all_pixels else file.without_data(window=part)  # noqa: E731
        with _second_beside(header, learned, second) as further:
            unread = _unread(header, bands)
            yield Reader(str(image), header.size, dtype, read, without_data, learned, further, unread=unread)


def _unread(header: Header, bands: Sequence[int]) -> str:
    """Which bands of a file are read, where it has more and nobody seems to have chosen."""
    names = [name for name in header.names if name != "alpha"]
    if list(bands) != [*DEFAULT_BANDS] or len(names) <= len(bands):
        return ""
    read = ", ".join(f"{band} {header.names[band - 1]}".rstrip() for band in bands)
    told = ", ".join(filter(None, names)) or "without names"
    return f"{len(names)} bands ({told}), of which {read} are read"


def check_rasters(learned: Learned, *, image: bool, second: bool) -> None:
    """Whether weights can do with what is given.

    Args:
        learned: what they know.
        image, second: whether there is one.

    Raises:
        DataError: a raster is missing that they never learned to do without, or is one too many.
    """
    wanted = learned.second
    if wanted is None:
        if not image and not second:
            raise DataError(f"there is no image; {_GIVE}")
        if second or not image:
            raise DataError("the model learned from images alone, it has no use for a second raster; leave it out")
        return
    for name, given, what in (("image", image, "the image"), ("second", second, f"the second raster ({wanted.name})")):
        if not given and name not in wanted.dispensable:
            raise DataError(
                f"the model never learned to do without {what}; give it, or train with modal.dropout above 0"
            )
    if not image and not second:
        raise DataError("there is neither an image nor a second raster; give one of them, or both")


@contextmanager
def _second_beside(image: Header, learned: Learned, second: RawImage | None) -> Iterator[Pixels | None]:
    """The channels of a second raster beside an image; None for weights that learned from images alone."""
    if learned.second is None:
        yield None
    elif second is None:
        yield lambda part: unknown(len(learned.second.bands), (part.height, part.width))
    else:
        with open_second_pixels(second, learned.second, image) as (_, pixels):
            yield pixels


@contextmanager
def open_second_pixels(
    second: RawImage, learned: SecondRecipe, image: Header | None
) -> Iterator[tuple[tuple[int, int], Pixels]]:
    """(H, W) of a second raster on the grid of its image, and its pixels, 0..1 and NaN where unknown.

    Args:
        second: array or file.
        learned: how it is read.
        image: the image's header; None: the raster's own grid.

    Raises:
        DataError: it is damaged, has too few bands, lies elsewhere, or knows nothing and is needed.
    """
    if isinstance(second, str | Path):
        if image is None:
            image = read_header(second)
        if learned.surplus == "error":
            refuse_surplus(second, learned.bands, whose=f"the second raster ({learned.name}) that was learned from")
        with open_second(second, image, learned.bands) as opened:
            if not opened.fit.same_grid and not learned.align:
                raise DataError(f"{second} lies on another grid than its image ({opened.fit.text}); warp it first")
            low_high = opened.low_high(learned.scale, learned.value_range)
            yield image.size, _scaled(opened.read, low_high, str(second), learned)
        return
    values = np.ma.filled(_array_of(second, "second raster").astype(np.float32), np.nan)
    values = _bands_first(values[None] if values.ndim == 2 else values, len(learned.bands), "second raster")
    if image is not None and values.shape[1:] != image.size:
        raise DataError(
            f"the second raster has {values.shape[2]}x{values.shape[1]} pixels, the image {image.width}x"
            f"{image.height}; give an array of the image's size, or files that say where they lie"
        )
    values = np.where(is_measured(values), values, np.nan)
    low_high = None
    if not np.isnan(values).all((1, 2)).any():
        ends = np.stack([np.nanmin(values, (1, 2)), np.nanmax(values, (1, 2))], 1)
        low_high = ends if learned.scale != "fixed" else np.array([learned.value_range] * len(values))
    read = lambda part: values[:, *part.slices].copy()  # noqa: E731
    yield values.shape[1:], _scaled(read, low_high, "the second raster", learned)


def _scaled(read: Pixels, low_high: np.ndarray | None, name: str, learned: SecondRecipe) -> Pixels:
    if low_high is not None:
        return lambda part: scaled(read(part), low_high, epsilon=epsilon_of(learned.scale))
    if "second" not in learned.dispensable:
        raise DataError(
            f"{name}: no pixel of the second raster is known there, and the model never learned to do without; mend "
            "it, or train with modal.dropout above 0"
        )
    return lambda part: unknown(len(learned.bands), (part.height, part.width))


def _array_of(image: object, name: str = "image") -> np.ndarray:
    """What was given as an array of real numbers; tensors from any device, of any floating-point type."""
    given = image
    try:
        if isinstance(image, torch.Tensor):
            image = image.detach().to("cpu", torch.float32 if image.dtype in _NOT_NUMPYS else image.dtype).numpy()
        array = np.asanyarray(image)
        if array.dtype.name == "bfloat16":  # numpy knows it through ml_dtypes alone
            array = array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"{name} is of type {type(given).__name__} and becomes no array ({_first_line(error)}); {_GIVE}"
        ) from error
    if array.dtype.kind not in "buif" or not array.ndim:
        kind = f"an array of {array.dtype}" if isinstance(given, np.ndarray) else f"of type {type(given).__name__}"
        raise DataError(f"{name} is {kind}; {_GIVE}")
    return array


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]


def _bands_first(image: np.ndarray, bands: int, name: str = "image") -> np.ndarray:
    if image.ndim == 3 and image.shape[0] == bands:
        return image
    if image.ndim == 3 and image.shape[-1] == bands:
        return np.moveaxis(image, -1, 0)
    raise DataError(f"{name} has shape {image.shape}; the model takes ({bands}, H, W) or (H, W, {bands})")


def _refuse_itself(image: str | Path, second: RawImage | None, learned: Learned) -> None:
    """One file may hold both rasters, as infrared beside colours, but no band of it is both."""
    if learned.second is None or not isinstance(second, str | Path) or not Path(second).exists():
        return
    if Path(image).samefile(second) and (both := sorted({*learned.bands} & {*learned.second.bands})):
        raise DataError(
            f"{image} would be its own second raster (band {both[0]} is read for both); give --second other files than "
            "--input"
        )


def _refuse_too_wide(image: str | Path, header: Header, dtype: str, learned: Learned) -> None:
    """The least that one row of windows takes: its pixels as stored and normalised, its logits and their sums."""
    further = 0 if learned.second is None else 4 * len(learned.second.bands)
    of_pixel = len(learned.bands) * (np.dtype(dtype).itemsize + 4) + further + 2 * 4 * len(learned.classes)
    needed, free = header.width * learned.crop * of_pixel, _free_memory()
    if needed > free:
        raise DataError(
            f"{image} is {header.width}x{header.height} pixels: a row of windows takes {bytes_text(needed)}, and "
            f"{bytes_text(free)} of memory are free; cut it into parts that are less wide"
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
