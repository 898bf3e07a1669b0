"""Predictor: puts images through a model, for evaluation, pictures, report pages, `cegate predict` and Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cegate.scenes.mosaic import Forward, Mosaic, Rows, Source
from cegate.scenes.sink import Sink


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

    def rows(self, source: Source) -> Iterator[Rows]:
        """Logits of an image from top to bottom.

        Raises:
            DataError: the image cannot be read.
        """
        with evaluation_mode(self.model):
            yield from self.mosaic.rows(self._call, source, self.device)

    def run(self, source: Source, sink: Sink, progress: Callable[[float], None] | None = None) -> None:
        """Put an image through, into a sink.

        Args:
            source: the image, as `open_reader` opens it.
            sink: takes its rows.
            progress: told the share of the image, 0..1, that is done.

        Raises:
            DataError: the image cannot be read.
        """
        for rows in self.rows(source):
            sink.write(rows)
            if progress is not None:
                progress(rows.place.stop / source.size[0])

    @torch.no_grad()
    def _call(self, images: Tensor) -> Tensor:
        with self.precision():
            return self.forward(images)


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
