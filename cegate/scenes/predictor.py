"""Predictor: puts images through a model, for evaluation, pictures, report pages, `cegate predict` and Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from cegate.errors import ConfigError, nearest
from cegate.losses import LEAST_SHARE, at_least_float32
from cegate.scenes.beside import Behind
from cegate.scenes.mosaic import Forward, Mosaic, Rows, Source
from cegate.scenes.sink import Result, Sink, begin_copy

TTA = ("none", "flip")
"""Test-time augmentation: windows as they are, or the mean of the shares of each window and its mirror image."""


@dataclass(frozen=True)
class Predictor:
    """A model and how it goes over an image; threads may share one."""

    forward: Forward
    """Normalised images [B, C, crop, crop] -> logits [B, K, crop, crop], each sample as it would be alone."""
    mosaic: Mosaic
    device: torch.device | str = "cpu"
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes the autocast context of a forward pass."""
    model: nn.Module | None = None
    """What is in evaluation mode meanwhile; None: nothing needs to be."""
    tta: str = "none"
    """One of `TTA`; with ``flip`` logits are logarithms of shares, and overlapping windows are averaged as shares."""

    def __post_init__(self) -> None:
        if self.tta not in TTA:
            raise ConfigError(f"tta={self.tta} is unknown; use {' or '.join(TTA)}{nearest(str(self.tta), TTA)}")

    def rows(self, source: Source) -> Iterator[Rows]:
        """Logits of an image from top to bottom.

        Raises:
            DataError: the image cannot be read.
        """
        mosaic = replace(self.mosaic, log_shares=True) if self.tta == "flip" else self.mosaic
        with evaluation_mode(self.model):
            yield from mosaic.rows(self._call, source, self.device)

    def run(self, source: Source, sink: Sink, progress: Callable[[float], None] | None = None) -> None:
        """Put an image through, into a sink. Threads that read ahead and write behind end with the call.

        Args:
            source: the image, as `open_reader` opens it.
            sink: takes its rows.
            progress: told the share of the image, 0..1, that is done.

        Raises:
            DataError: the image cannot be read.
        """
        with closing(self.rows(source)) as parts, Behind() as later:
            for place, logits, empty in parts:
                write = partial(_write, sink, place, begin_copy(sink.keep(logits)), empty)
                del logits  # before those of the next rows come
                if place.stop < source.size[0]:
                    later(write)
                else:  # nothing is left to do meanwhile
                    later.finish()
                    write()
                if progress is not None:
                    progress(place.stop / source.size[0])

    @torch.no_grad()
    def _call(self, images: Tensor) -> Tensor:
        with self.precision():
            logits = self.forward(images)
            if self.tta == "none":
                return logits
            mirrored = self.forward(images.flip(-1)).flip(-1)
        shares = [at_least_float32(part).softmax(1) for part in (logits, mirrored)]
        return (torch.stack(shares).mean(0) + LEAST_SHARE).log()


def _write(sink: Sink, place: slice, kept: Callable[[], np.ndarray], empty: np.ndarray | None) -> None:
    sink.write(Result(place, kept(), empty))


_modes_lock = threading.Lock()
_modes: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: nn.Module | None) -> Iterator[None]:
    """Hold a model in evaluation mode; when the last of the threads that hold it so is through, the modules that were
    in training mode are so again."""
    if model is None:
        yield
        return
    with _modes_lock:
        held, training = _modes.get(model, (0, []))
        if not held:
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
        _modes[model] = held + 1, training
    try:
        yield
    finally:
        with _modes_lock:
            held, training = _modes.pop(model)
            if held > 1:
                _modes[model] = held - 1, training
            else:
                for module in training:
                    module.training = True
