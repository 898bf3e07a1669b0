"""Mosaic: logits of an image of any size from a model that sees squares.

An image goes through from top to bottom, so that a scene need not fit in memory: a row of it is done once no window
that is still to come covers it. The rows that the next windows need are read while the model runs on these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, zip_longest
from numbers import Integral
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cegate.errors import ConfigError, nearest
from cegate.scenes.beside import ahead

PIXELS_ON_GPU, PIXELS_ON_CPU = 8 * 512**2, 8 * 128**2
"""Of the windows that run together: small ones alone leave a device idle between operators, large ones fill it."""
BLENDS = ("none", "linear", "cosine")
"""How windows that overlap are weighed: alike, or less towards their edges, where a model sees less around a pixel."""
_LEAST = 1e-4  # of a cosine's weight: a corner's product of two still divides well in float32

Forward = Callable[[Tensor], Tensor]
"""Normalised images [B, C, crop, crop] -> logits [B, K, crop, crop]."""


class Strip(NamedTuple):
    """Whole rows of an image."""

    pixels: Tensor
    """[C, n, W] float32, normalised."""
    empty: np.ndarray | None = None
    """[n, W] bool: where the image has no data; None: nowhere in it."""


class Rows(NamedTuple):
    """Whole rows of a result."""

    place: slice
    """Which rows of the image."""
    logits: Tensor
    """[K, n, W], at least float32."""
    empty: np.ndarray | None = None
    """[n, W] bool, see `Strip`."""


class Source(Protocol):
    """An image that is read once, from top to bottom."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""

    def read(self, first: int, last: int) -> Strip:
        """Rows first..last-1."""


class Pixels:
    """A normalised image [C, H, W] in memory as a source."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.size = image, tuple(image.shape[-2:])

    def read(self, first: int, last: int) -> Strip:
        """Rows first..last-1."""
        return Strip(self.image[:, first:last])


@dataclass(frozen=True)
class Mosaic:
    """How windows go over an image, and how their logits become those of its pixels.

    Raises:
        ConfigError: the stride leaves gaps, or there is no such blend.
    """

    crop: int
    """Side of a window in pixels. A smaller image is filled up with zeros (the mean colour) below and to the right."""
    stride: int | None = None
    """Step between windows in pixels; None: two thirds of the window, as CrossEarth-Gate tests (341 px for 512)."""
    blend: str = "none"
    """``none``: the mean of the windows a pixel lies in, the published protocol. ``linear``, ``cosine``: a mean weighed
    by a tent or a squared sine along each axis, which leaves no seams where windows end."""
    batch: int | None = None
    """Windows of one forward pass; it changes speed and memory only. None: by the device and ``crop``."""
    fit: int | None = None
    """Windows go over the image shrunk to fit a square of this side, and the logits are enlarged again; a smaller image
    stays as it is."""
    log_shares: bool = False
    """The logits are logarithms of shares (`Head.log_shares`) and are averaged as shares. The mean of logarithms would
    let one sure window overrule all others."""
    further: int = 0
    """Channels, the last ones, of a second raster: NaN there is unknown, and so is what lies beyond a small image; in
    all channels where the image is NaN throughout, for it is missing."""

    def __post_init__(self) -> None:
        if self.blend not in BLENDS:
            raise ConfigError(
                f"blend={self.blend} is unknown; use {', '.join(BLENDS[:-1])} or {BLENDS[-1]}"
                f"{nearest(str(self.blend), BLENDS)}"
            )
        whole = isinstance(self.stride, Integral) and not isinstance(self.stride, bool)
        if self.stride is not None and not (whole and 1 <= self.stride <= self.crop):
            raise ConfigError(f"stride={self.stride} does not fit windows of {self.crop} px; use 1..{self.crop}")

    def rows(self, forward: Forward, source: Source, device: torch.device | str = "cpu") -> Iterator[Rows]:
        """Logits of an image from top to bottom; some windows' height of it is held.

        Args:
            forward: what windows are put through. One window gives exactly ``forward(image)``.
            source: the image; each of its rows is asked for once, in order, and in one thread, which may be another.
            device: where windows, logits and sums lie.
        """
        if self.fit is not None and max(source.size) > self.fit:
            yield from self._fitted(forward, source, torch.device(device))
        else:
            yield from self._slide(forward, source, torch.device(device))

    def _slide(self, forward: Forward, source: Source, device: torch.device) -> Iterator[Rows]:
        (height, width), crop = source.size, self.crop
        stride = self.stride or default_stride(crop)
        tops, lefts = window_starts(height, crop, stride), window_starts(width, crop, stride)
        corners = [(top, left) for top in tops for left in lefts]
        as_shares = self.log_shares and len(corners) > 1
        batch = self.batch or windows_at_once(device, crop)
        of_row, of_column = (_weights(self.blend, starts, crop).to(device) for starts in (tops, lefts))
        row_sums, column_sums = _sums(of_row, tops).to(device), _sums(of_column, lefts).to(device)
        weights = None if self.blend == "none" else of_row[:, None] * of_column

        chunks = [corners[first : first + batch] for first in range(0, len(corners), batch)]
        ends = sorted({crop, *(chunk[-1][0] + crop for chunk in chunks)})
        span = max(chunk[-1][0] - chunk[0][0] for chunk in chunks) + crop
        with ahead(partial(_read, source, device), list(pairwise([0, *ends]))) as strips:
            held, held_from = self._filled(next(strips), source.size, device), 0  # the image from `held_from` on
            sums, done = None, 0  # of `span` rows from `done` on
            for chunk, following in zip_longest(chunks, chunks[1:]):
                top, bottom = chunk[0][0], chunk[-1][0] + crop
                if held_from + held.pixels.shape[1] < bottom:
                    held = _joined(held, top - held_from, self._filled(next(strips), source.size, device))
                    held_from = top
                logits = forward(torch.stack([_window(held.pixels, y - held_from, x, crop) for y, x in chunk]))
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                logits = logits.exp() if as_shares else logits
                sums = logits.new_zeros(logits.shape[1], span, held.pixels.shape[2]) if sums is None else sums
                for window, (y, x) in zip(logits, chunk, strict=True):
                    place = _window(sums, y - done, x, crop)
                    place.add_(window) if weights is None else place.addcmul_(window, weights.to(window.dtype))
                reached = following[0][0] if following else bottom
                if reached > done:
                    last = min(reached, height)
                    empty = None if held.empty is None else held.empty[done - held_from : last - held_from]
                    weight = row_sums[done:last, None] * column_sums[:width]
                    yield Rows(slice(done, last), _mean(sums[:, : last - done, :width], weight, as_shares), empty)
                    _move_up(sums, reached - done)
                    done = reached

    def _filled(self, strip: Strip, size: tuple[int, int], device: torch.device) -> Strip:
        """Rows of the image on the device, filled up to a window where it is smaller."""
        height, width = size
        pixels = strip.pixels.to(device, non_blocking=True)
        below, right = max(self.crop - height, 0), max(self.crop - width, 0)
        if below or right:
            own = len(pixels) - self.further
            is_missing = self.further > 0 and bool(pixels[:own].isnan().all())  # then training knows nothing of it
            pixels = F.pad(pixels, (0, right, 0, below))
            beyond = pixels if is_missing else pixels[own:]
            beyond[:, height:] = beyond[:, :, width:] = torch.nan
        return strip._replace(pixels=pixels)

    def _fitted(self, forward: Forward, source: Source, device: torch.device) -> Iterator[Rows]:
        height, width = source.size
        whole = source.read(0, height)
        size = [max(1, round(side * self.fit / max(source.size))) for side in source.size]
        shrunk = _shrunk(whole.pixels, size)
        parts = replace(self, fit=None)._slide(forward, Pixels(shrunk), device)
        logits = torch.cat([rows.logits for rows in parts], dim=1)
        for first in range(0, height, self.crop):
            place = slice(first, min(first + self.crop, height))
            empty = None if whole.empty is None else whole.empty[place]
            yield Rows(place, _enlarged(logits, (height, width), place), empty)


def _read(source: Source, device: torch.device, rows: tuple[int, int]) -> Strip:
    """Rows of the image on the host; for a GPU where it can fetch them while it computes."""
    strip = source.read(rows[0], min(rows[1], source.size[0]))
    pin = device.type == "cuda" and not strip.pixels.is_cuda
    return strip._replace(pixels=strip.pixels.pin_memory()) if pin else strip


def windows_at_once(device: torch.device, crop: int) -> int:
    """Windows of ``crop`` px that keep a device busy; more only costs memory."""
    return max(1, (PIXELS_ON_CPU if device.type == "cpu" else PIXELS_ON_GPU) // crop**2)


def default_stride(crop: int) -> int:
    """Two thirds of the window."""
    return max(1, crop * 2 // 3)


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of windows that cover an axis; the last one ends at the edge."""
    return [*range(0, max(length - crop, 0), stride), max(length - crop, 0)]


def _weights(blend: str, starts: Sequence[int], crop: int) -> Tensor:
    """Weight of each pixel of a window along an axis, [crop] float32 > 0; all alike where there is one window."""
    place = (torch.arange(crop, dtype=torch.float64) + 0.5) / crop
    if blend == "none" or len(starts) == 1:
        weights = torch.ones(crop)
    elif blend == "linear":
        weights = 2 * torch.minimum(place, 1 - place)
    else:
        weights = _LEAST + (1 - _LEAST) * (math.pi * place).sin().square()
    return weights.float()


def _sums(weights: Tensor, starts: Sequence[int]) -> Tensor:
    """Sum over windows of the weights of each pixel of an axis."""
    sums = torch.zeros(starts[-1] + len(weights))
    for start in starts:
        sums[start : start + len(weights)] += weights.to(sums)
    return sums


def _mean(sums: Tensor, weight: Tensor, as_shares: bool) -> Tensor:
    mean = sums / weight
    return mean.log() if as_shares else mean


def _move_up(sums: Tensor, rows: int) -> None:
    """Drop rows at the top; new ones below are 0."""
    kept = sums[:, rows:].clone()  # it may overlap the place it goes to
    sums[:, : kept.shape[1]] = kept
    sums[:, kept.shape[1] :] = 0


def _window(pixels: Tensor, top: int, left: int, crop: int) -> Tensor:
    return pixels[:, top : top + crop, left : left + crop]


def _joined(held: Strip, dropped: int, more: Strip) -> Strip:
    """Strips one below the other, without the first rows."""
    empty = None if held.empty is None else np.concatenate((held.empty[dropped:], more.empty))
    return Strip(torch.cat((held.pixels[:, dropped:], more.pixels), dim=1), empty)


def _shrunk(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """[C, H, W] -> [C, *size]; of pixels that are NaN in part the known count, where they are half or more."""
    shrink = partial(F.interpolate, size=list(size), mode="bilinear", antialias=True)
    if not (holes := pixels.isnan()).any():
        return shrink(pixels[None])[0]
    known = shrink((~holes).to(pixels)[None])[0]
    return torch.where(known >= 0.5, shrink(pixels.nan_to_num(nan=0.0)[None])[0] / known, torch.nan)


def _enlarged(logits: Tensor, size: tuple[int, int], place: slice) -> Tensor:
    """Rows of ``F.interpolate(logits, size, mode="bilinear")``: [K, h, w] -> [K, n, W]."""
    height, width = size
    at = (torch.arange(place.start, place.stop, dtype=torch.float64) + 0.5) * logits.shape[1] / height - 0.5
    at = at.clamp(0, logits.shape[1] - 1)
    above = at.long()
    below = (above + 1).clamp(max=logits.shape[1] - 1)
    share = (at - above).to(logits)[:, None]
    rows = torch.lerp(logits[:, above.to(logits.device)], logits[:, below.to(logits.device)], share)
    return F.interpolate(rows[None], (len(at), width), mode="bilinear")[0]
