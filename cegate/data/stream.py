"""Batches as a pure function of (seed, purpose, iteration): equal for any number of workers, and after any resume.

Every epoch is a permutation of its own, seeded by (seed, purpose, epoch). Every sample of a batch has a generator of
its own, seeded by (seed, purpose, iteration, slot), that decides on its crop and its changes. Nothing here touches a
global generator.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cegate.config import IGNORE, AugmentConfig
from cegate.data.sets import UNLABELLED, SegmentationSet
from cegate.data.transforms import augment_from, fill_up, normalise
from cegate.errors import CegateError, ConfigError, DataError

# what a draw decides; part of its seed, or an epoch and an iteration of equal number would share a generator
_ORDER, _CHANGES = 0, 1


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together."""

    image: torch.Tensor
    """[B, C, H, W] float32, normalised. Channels of a second raster come last; there NaN is what nobody knows: a hole,
    or a raster that the sample lacks."""
    label: torch.Tensor
    """[B, H, W] int64, class index or 255; all 255 for a set without labels."""
    names: list[str]
    valid: torch.Tensor | None = None
    """[B, H, W] bool: not padding, not NaN. Only of a set without labels, where `label` cannot tell."""
    channels: tuple[int, ...] = ()
    """How many of the channels belong to each raster, in order; () stands for one raster."""

    @property
    def streams(self) -> int:
        """Rasters that the samples are made of."""
        return max(1, len(self.channels))

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from where it is copied to a GPU in the background."""
        return self._map(torch.Tensor.pin_memory)

    def pieces(self, size: int) -> Iterator[Batch]:
        """The batch in parts of at most ``size`` samples, in order."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            names = self.names[part]
            yield replace(self._map(lambda tensor, part=part: tensor[part]), names=names)

    def clone(self) -> Batch:
        """A copy with tensors of its own."""
        return self._map(torch.Tensor.clone)

    def fill(self, other: Batch) -> None:
        """Take over the tensors of a batch of the same shapes, in place."""
        for mine, theirs in ((self.image, other.image), (self.label, other.label), (self.valid, other.valid)):
            if mine is not None:
                mine.copy_(theirs, non_blocking=True)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        valid = None if self.valid is None else change(self.valid)
        return Batch(change(self.image), change(self.label), self.names, valid, self.channels)


class TrainStream:
    """Random crops of a set, without end.

    Args:
        dataset: the set. Without labels, no crop is drawn again for its classes.
        crop: side of a crop in pixels.
        batch_size: crops per batch.
        augment: random changes.
        seed: the run's seed, >= 0.
        mean, std: of each band, on 0..1; those of a second raster may be left out and are then 0 and 1.
        purpose: streams of different purposes ("train", "fisher") draw independently.
        slots: samples of a batch that this process takes; default: all.

    Raises:
        ConfigError: crop or batch_size is not positive, or mean and std do not fit the bands.
    """

    def __init__(
        self,
        dataset: SegmentationSet,
        *,
        crop: int,
        batch_size: int,
        augment: AugmentConfig,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        purpose: str = "train",
        slots: range | None = None,
    ) -> None:
        if crop < 1 or batch_size < 1:
            raise ConfigError(f"data.crop={crop}, data.batch_size={batch_size}: use 1 or more")
        low, high = augment.resize if len(augment.resize) == 2 else (0, 0)
        if not 0 < low <= high:
            raise ConfigError(f"data.augment.resize={augment.resize} is not [low, high] with 0 < low <= high")
        self.mean, self.std = _statistics(dataset, mean, std)
        if not dataset.labelled:
            augment = replace(augment, max_class_share=1.0)
        self.dataset, self.crop, self.batch_size, self.augment = dataset, crop, batch_size, augment
        self.slots = range(batch_size) if slots is None else slots
        self._key = (seed, zlib.crc32(purpose.encode()))

    def batch(self, iteration: int) -> Batch:
        """The batch of an iteration, >= 0."""
        samples = [self._sample(iteration, slot) for slot in self.slots]
        images, labels, names = zip(*samples, strict=True)
        image = torch.from_numpy(np.stack(images))
        label, valid = torch.from_numpy(np.stack(labels).astype(np.int64)), None
        if not self.dataset.labelled:
            label, valid = torch.full_like(label, IGNORE), label == UNLABELLED
        return Batch(image, label, list(names), valid, self.dataset.channels)

    def _sample(self, iteration: int, slot: int) -> tuple[np.ndarray, np.ndarray, str]:
        index = self._index(iteration * self.batch_size + slot)
        rng = np.random.default_rng([*self._key, _CHANGES, iteration, slot])
        image, label = augment_from(self.dataset, index, rng, crop=self.crop, cfg=self.augment)
        image, label = fill_up(normalise(image, self.mean, self.std), label, self.crop, len(self.dataset.second_bands))
        return image, label, self.dataset.item_name(index)

    def _index(self, draw: int) -> int:
        """Which item the draw-th sample of the stream comes from."""
        epoch, position = divmod(draw, len(self.dataset))
        order = np.random.default_rng([*self._key, _ORDER, epoch]).permutation(len(self.dataset))
        return int(order[position])

    def loader(
        self, start: int, stop: int, workers: int = 0, *, pin_memory: bool = False, context: str | None = None
    ) -> Iterator[Batch]:
        """The batches start..stop-1, in order.

        Args:
            start: first iteration.
            stop: iteration after the last.
            workers: processes that prepare batches ahead; 0: prepared when asked for.
            pin_memory: hand out page-locked batches.
            context: how workers start ("fork", "spawn", "forkserver"); default: torch's choice.

        Closing or dropping the iterator ends the workers.
        """
        return fetch(self.batch, range(start, stop), workers, pin_memory=pin_memory, context=context)


class EvalStream:
    """Whole images of a set in order, one per batch: sizes may differ.

    Args:
        dataset: the set.
        mean, std: of each band, on 0..1; as in `TrainStream`.
    """

    def __init__(self, dataset: SegmentationSet, *, mean: Sequence[float], std: Sequence[float]) -> None:
        self.dataset = dataset
        self.mean, self.std = _statistics(dataset, mean, std)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, index: int) -> Batch:
        """Item `index` as a batch of one: image [1, C, H, W], label [1, H, W]."""
        item = self.dataset.read(index)
        image = torch.from_numpy(normalise(item.image[None], self.mean, self.std))
        label = torch.from_numpy(item.label[None].astype(np.int64))
        return Batch(image, label, [item.name], channels=self.dataset.channels)

    def loader(
        self, start: int = 0, stop: int | None = None, workers: int = 0, *, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """The items start..stop-1 (default: all), in order; as `TrainStream.loader`."""
        return fetch(self.batch, range(start, len(self) if stop is None else stop), workers, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[Batch]:
        return self.loader()


def _statistics(
    dataset: SegmentationSet, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of every channel, or of the image's bands alone."""
    bands, second = len(dataset.bands), len(dataset.second_bands)
    if len(mean) != len(std) or len(mean) not in (bands, bands + second):
        more = f" (or {bands + second} with those of the second raster)" if second else ""
        raise ConfigError(
            f"set {dataset.name!r} has {bands} bands {list(dataset.bands)}{more}, but mean has {len(mean)} "
            f"and std {len(std)} values; set bands to as many as the backbone takes"
        )
    return tuple(mean), tuple(std)


class _Batches(Dataset):
    """A batch function as torch's loader wants it. Errors travel as values: raised, they lose their text."""

    def __init__(self, batch: Callable[[int], Batch]) -> None:
        self.batch = batch

    def __getitem__(self, iteration: int) -> Batch | CegateError:
        try:
            return self.batch(iteration)
        except CegateError as error:
            return error


class WorkerLostError(DataError):
    """A data worker was killed, or gives nothing any more; what is trained so far is not touched by it."""


def worker_lost(error: BaseException) -> WorkerLostError | None:
    """What torch says of a killed worker, in one line; None for another error.

    torch raises it from wherever the main thread is when the worker ends, not only where batches are asked for.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker"):
        return None
    by = text.partition("by signal: ")[2].partition(".")[0]
    return _lost(f"was killed ({by})" if by else "was killed")


def _lost(why: str) -> WorkerLostError:
    return WorkerLostError(
        f"a data worker {why}, as when memory or /dev/shm runs out, or a disk hangs; use fewer data.workers "
        "(0: none), a smaller data.batch_size or data.crop, or more memory"
    )


# longer than any batch takes to read, even from a slow disk
PATIENCE_S = 300.0
# with a worker that the system says is stopped, as by SIGSTOP: no disk is that slow
STOPPED_S = 20.0


def _is_stopped(worker: BaseProcess) -> bool:
    try:
        return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):  # it has ended, or the system has no such files
        return False


class _Patience:
    """Kills the workers when a wait for them lasts too long, so that it ends.

    torch's own time limit ends no wait for a worker that was stopped while it hands over a tensor.
    """

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        self.workers, self.since, self.is_over, self.waited = workers, None, False, 0.0
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(min(PATIENCE_S, STOPPED_S) / 10):
            since = self.since
            waited = 0.0 if since is None else time.monotonic() - since
            if waited > PATIENCE_S or (waited > STOPPED_S and any(map(_is_stopped, self.workers))):
                self.waited, self.is_over = waited, True
                for worker in self.workers:
                    worker.kill()
                return

    def next(self, batches: Iterator[Any]) -> Any:
        """What the workers give next.

        Raises:
            WorkerLostError: for whatever torch raises where one of them has gone.
        """
        self.since = time.monotonic()
        try:
            try:
                return next(batches)
            except (EOFError, OSError) as error:
                # a socket closes a moment before its worker has ended, and torch's word of that may come here, too
                if self._one_ended():
                    raise _lost("was killed") from error
                raise
        except Exception as error:
            lost = error if isinstance(error, WorkerLostError) else worker_lost(error)
            if self.is_over:
                self._one_ended()
                lost = _lost(f"gave nothing for {self.waited:.0f} s")
            if lost is None:
                raise
            raise lost from error
        finally:
            self.since = None

    def _one_ended(self) -> bool:
        for worker in self.workers:
            worker.join(1 / len(self.workers))
        return not all(worker.is_alive() for worker in self.workers)

    def end(self) -> None:
        """Nothing is waited for any more; torch's word of a worker's end, which may come now, says nothing new."""
        try:
            self._done.set()
        except RuntimeError as error:
            if worker_lost(error) is None:
                raise
            self._done.set()


def fetch(
    batch: Callable[[int], Any],
    iterations: range,
    workers: int,
    *,
    pin_memory: bool = False,
    context: str | None = None,
) -> Iterator[Any]:
    """``batch(iteration)`` for every iteration, in order; as `TrainStream.loader`, for any function of the iteration.

    Raises:
        WorkerLostError: a worker was killed, or gave nothing for `PATIENCE_S` seconds.
    """
    if workers == 0:
        for iteration in iterations:
            ready = batch(iteration)
            yield ready.pin_memory() if pin_memory else ready
        return
    loader = DataLoader(
        _Batches(batch),
        batch_size=None,
        sampler=iterations,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        generator=torch.Generator(),  # or torch would draw a seed from the global generator
    )
    batches = iter(loader)
    patience = _Patience(batches._workers)
    try:
        for _ in iterations:
            ready = patience.next(batches)
            if isinstance(ready, CegateError):
                raise ready
            yield ready
    finally:
        patience.end()
