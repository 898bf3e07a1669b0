"""Sink: takes the rows of a result as they are done: into an array, or into a PNG or GeoTIFF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cegate.config import IGNORE
from cegate.data.encoders import Writer
from cegate.data.rasters import open_mask
from cegate.runfolder import written_aside
from cegate.scenes.mosaic import Rows


class Sink(Protocol):
    """Takes a result from top to bottom."""

    def write(self, rows: Rows) -> None:
        """The next rows."""


def likeliest_class(logits: Tensor) -> Tensor:
    """Index of the largest logit of every pixel, the first of equals: [..., K, H, W] -> [..., H, W] int64."""
    return logits.max(-3).indices  # argmax takes two to eight times as long over classes on a CPU


def classes_of(rows: Rows) -> np.ndarray:
    """Class of every pixel, [n, W] uint8; 255 where the image is empty."""
    classes = likeliest_class(rows.logits).to(torch.uint8).cpu().numpy()
    if rows.empty is not None:
        classes[rows.empty] = IGNORE
    return classes


class ClassArray:
    """Classes in memory: ``array`` is [H, W] uint8, 255 where the image is empty."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.array = np.empty(size, np.uint8)

    def write(self, rows: Rows) -> None:
        self.array[rows.place] = classes_of(rows)


class ShareArray:
    """Class probabilities in memory: ``array`` is [K, H, W] float32, NaN where the image is empty."""

    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        self.array = np.empty((classes, *size), np.float32)

    def write(self, rows: Rows) -> None:
        shares = rows.logits.float().softmax(0).cpu().numpy()
        if rows.empty is not None:
            shares[:, rows.empty] = np.nan
        self.array[:, rows.place] = shares


class MaskFile:
    """Classes in a file; a tile's height of them is held.

    Attributes:
        without_data: share of the pixels so far, 0..1, that are empty.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer, self._empty, self._all = writer, 0, 0

    def write(self, rows: Rows) -> None:
        classes = classes_of(rows)
        self._writer.write(classes)
        self._all += classes.size
        self._empty += 0 if rows.empty is None else int(rows.empty.sum())

    @property
    def without_data(self) -> float:
        return self._empty / max(self._all, 1)


@contextmanager
def open_mask_file(
    path: Path, size: tuple[int, int], *, like: str | Path | None = None, palette: Sequence[str] | None = None
) -> Iterator[MaskFile]:
    """Write a .png or .tif file that is whole when the block ends well, and else absent; see
    `cegate.data.rasters.open_mask`.

    Raises:
        DataError: another suffix, or a size that differs from that of `like`.
        OSError: the file cannot be written, as on a full disk.
    """
    with written_aside(path) as aside, open_mask(aside, size, like=like, palette=palette) as writer:
        yield MaskFile(writer)
