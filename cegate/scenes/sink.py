"""Sink: takes the rows of a result as they are done: into an array, or into a PNG or GeoTIFF."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cegate.config import IGNORE
from cegate.data.encoders import Writer
from cegate.data.writing import open_mask
from cegate.runfolder import written_aside


class Result(NamedTuple):
    """Whole rows of what a sink keeps."""

    place: slice
    """Which rows of the image."""
    values: np.ndarray
    """[..., n, W], as `Sink.keep` made them; the sink may write into them."""
    empty: np.ndarray | None = None
    """[n, W] bool: where the image has no data; None: nowhere in it."""


class Sink(Protocol):
    """Takes a result from top to bottom."""

    def keep(self, logits: Tensor) -> Tensor:
        """What it keeps of logits [K, n, W], made where they lie; nothing else comes back from a GPU."""

    def write(self, rows: Result) -> None:
        """The next rows; after those before them, in any thread."""


def likeliest_class(logits: Tensor) -> Tensor:
    """Index of the largest logit of every pixel, the first of equals: [..., K, H, W] -> [..., H, W] int64."""
    return logits.max(-3).indices  # argmax takes two to eight times as long over classes on a CPU


def begin_copy(values: Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy values to the host; the call that is returned waits for the end of it, and of nothing later."""
    host = values.to("cpu", non_blocking=values.is_cuda)
    if not values.is_cuda:
        return host.numpy
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def finish() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return finish


class _Classes:
    """Keeps the class of every pixel, uint8."""

    def keep(self, logits: Tensor) -> Tensor:
        return likeliest_class(logits).to(torch.uint8)

    @staticmethod
    def _of(rows: Result) -> np.ndarray:
        """[n, W]; 255 where the image is empty."""
        if rows.empty is not None:
            rows.values[rows.empty] = IGNORE
        return rows.values


class ClassArray(_Classes):
    """Classes in memory: ``array`` is [H, W] uint8, 255 where the image is empty."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.array = np.empty(size, np.uint8)

    def write(self, rows: Result) -> None:
        self.array[rows.place] = self._of(rows)


class ShareArray:
    """Class probabilities in memory: ``array`` is [K, H, W] float32, NaN where the image is empty."""

    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        self.array = np.empty((classes, *size), np.float32)

    def keep(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(0)

    def write(self, rows: Result) -> None:
        if rows.empty is not None:
            rows.values[:, rows.empty] = np.nan
        self.array[:, rows.place] = rows.values


class MaskFile(_Classes):
    """Classes in a file; a tile's height of them is held.

    Attributes:
        without_data: share of the pixels so far, 0..1, that are empty.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer, self._empty, self._all = writer, 0, 0

    def write(self, rows: Result) -> None:
        self._writer.write(self._of(rows))
        self._all += rows.values.size
        self._empty += 0 if rows.empty is None else int(rows.empty.sum())

    @property
    def without_data(self) -> float:
        return self._empty / max(self._all, 1)


@contextmanager
def open_mask_file(
    path: Path, size: tuple[int, int], *, like: str | Path | None = None, palette: Sequence[str] | None = None
) -> Iterator[MaskFile]:
    """Write a .png or .tif file that is whole when the block ends well, and else absent; see
    `cegate.data.writing.open_mask`. Its folder is not made.

    Raises:
        DataError: another suffix, or a size that differs from that of `like`.
        OSError: the file cannot be written, as on a full disk.
    """
    with (
        written_aside(path, make_folder=False) as aside,
        open_mask(aside, size, like=like, palette=palette) as writer,
    ):
        yield MaskFile(writer)
