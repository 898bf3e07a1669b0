"""What an iteration trains on: where its samples come from, and which losses they give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from cegate.config import Config
from cegate.data.datasets import SegmentationSet
from cegate.data.stream import Batch, TrainStream
from cegate.models.segmenter import Segmenter


@dataclass(frozen=True)
class Term:
    """One part of the loss of an iteration, which is the sum over terms of weight x mean of losses."""

    name: str
    losses: Tensor
    """[n], of each sample alone."""
    samples: list[str]
    """Their names."""
    weight: float = 1.0


class Objective(Protocol):
    """What training minimises. Every draw is a function of (seed, iteration), so that a resumed run goes on exactly."""

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """What the iterations start..stop-1 need, in order."""

    def terms(self, batch: Any, iteration: int) -> list[Term]:
        """The losses of an iteration; the source's come first."""

    def after_step(self, iteration: int) -> None:
        """The optimiser has done the step of an iteration."""

    def probe(self, iteration: int) -> Iterator[Batch]:
        """Samples of the Fisher probe of an iteration, in pieces of the training batch size, on the device."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class Supervised:
    """Random crops of the labelled source domain."""

    def __init__(self, config: Config, segmenter: Segmenter, source: SegmentationSet) -> None:
        self.config, self.segmenter = config, segmenter
        stream = partial(
            TrainStream,
            source,
            crop=config.data.crop,
            augment=config.data.augment,
            seed=config.run.seed,
            mean=segmenter.mean,
            std=segmenter.std,
        )
        self._stream = stream(batch_size=config.data.batch_size, purpose="train")
        self._probe = stream(batch_size=config.gate.samples, purpose="fisher")

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        on_gpu = self.segmenter.device.type == "cuda"
        return self._stream.loader(start, stop, self.config.data.workers, pin_memory=on_gpu)

    def terms(self, batch: Batch, iteration: int) -> list[Term]:
        batch = batch.to(self.segmenter.device, non_blocking=True)
        return [Term("source", self.segmenter.loss(batch.image, batch.label), batch.names)]

    def after_step(self, iteration: int) -> None:
        """Nothing follows the optimiser."""

    def probe(self, iteration: int) -> Iterator[Batch]:
        return pieces(self._probe.batch(iteration), self.config.data.batch_size, self.segmenter)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is none."""


def pieces(batch: Batch, size: int, segmenter: Segmenter) -> Iterator[Batch]:
    """Parts of at most ``size`` samples, on the model's device."""
    for first in range(0, len(batch), size):
        part = slice(first, first + size)
        yield Batch(batch.image[part], batch.label[part], batch.names[part]).to(segmenter.device)


def make_objective(config: Config, segmenter: Segmenter, source: SegmentationSet) -> Objective:
    """The objective that a configuration asks for."""
    return Supervised(config, segmenter, source)
