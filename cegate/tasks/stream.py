"""What an iteration needs, prepared by the data workers: source crops, and what the tasks draw beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cegate.config import Config
from cegate.data.sets import SegmentationSet
from cegate.data.stream import Batch, TrainStream, fetch
from cegate.segmenter import Segmenter
from cegate.tasks.task import Draw

Share = Callable[[int], range]
"""Slots 0..n-1 of a batch of n -> those of this process; ``range`` where there is one."""


def crops_of(
    config: Config, network: Segmenter, dataset: SegmentationSet, batch_size: int, purpose: str, share: Share = range
) -> TrainStream:
    """A set's stream of crops, as the network takes them."""
    return TrainStream(
        dataset,
        crop=config.data.crop,
        batch_size=batch_size,
        augment=config.data.augment,
        seed=config.run.seed,
        mean=network.recipe.mean,
        std=network.recipe.std,
        purpose=purpose,
        slots=share(batch_size),
    )


@dataclass(frozen=True)
class StepData:
    """What an iteration needs."""

    source: Batch
    drawn: Mapping[str, Any]
    """Task -> what it drew."""
    pixels: Tensor
    """[256] int64: label value -> its pixels in the source crops; stays on the CPU."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StepData:
        """The data on another device."""
        move = lambda value: None if value is None else value.to(device, non_blocking=non_blocking)  # noqa: E731
        return StepData(move(self.source), {name: move(value) for name, value in self.drawn.items()}, self.pixels)

    def pin_memory(self) -> StepData:
        """The data in page-locked memory."""
        drawn = {name: None if value is None else value.pin_memory() for name, value in self.drawn.items()}
        return StepData(self.source.pin_memory(), drawn, self.pixels)


class Probes:
    """A stream's batches for the scoring rounds. With data workers one more of them reads the next ones while steps are
    made, so that no round waits for files.

    Args:
        config: how often rounds come, and whether there are workers.
        crops: a batch is what one round scores.
    """

    def __init__(self, config: Config, crops: TrainStream) -> None:
        self.crops, self.every, self.workers = crops, config.gate.interval, min(1, config.data.workers)
        self.stop = config.train.iterations
        self._next, self._ahead = -1, iter(())

    def batch(self, iteration: int) -> Batch:
        """Of the round before an iteration.

        Raises:
            WorkerLostError: the worker was killed, or gives nothing any more.
        """
        if not self.workers or iteration >= self.stop:
            return self.crops.batch(iteration)
        if iteration != self._next:
            self._ahead = fetch(self.crops.batch, range(iteration, self.stop, self.every), self.workers)
        self._next = iteration + self.every
        return next(self._ahead)


class StepStream:
    """Source crops joined by the draws of the tasks; a pure function of the iteration, as its source is.

    Args:
        source: crops of the labelled domain.
        draws: task -> what it draws beside them.
    """

    def __init__(self, source: TrainStream, draws: Mapping[str, Draw]) -> None:
        self.source, self.draws = source, dict(draws)

    def batch(self, iteration: int) -> StepData:
        """What an iteration, >= 0, needs."""
        source = self.source.batch(iteration)
        drawn = {name: draw(iteration, source) for name, draw in self.draws.items()}
        return StepData(source, drawn, torch.bincount(source.label.flatten(), minlength=256))

    def loader(self, start: int, stop: int, workers: int = 0, *, pin_memory: bool = False) -> Iterator[StepData]:
        """The iterations start..stop-1, in order; as `TrainStream.loader`."""
        return fetch(self.batch, range(start, stop), workers, pin_memory=pin_memory)
