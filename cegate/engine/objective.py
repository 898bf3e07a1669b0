"""What an iteration trains on: where its samples come from, and which losses they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from cegate.config import Config
from cegate.data.datasets import SegmentationSet
from cegate.data.stream import Batch, DomainPair, PairStream, TrainStream
from cegate.engine.adaptation import Teacher, mix_domains, share_of_sure
from cegate.segmenter import Segmenter


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

    def journal(self) -> dict[str, float]:
        """What the next line of the journal says besides the loss: means since the last one."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


def _stream_of(config: Config, segmenter: Segmenter, dataset: SegmentationSet) -> Callable[..., TrainStream]:
    """A set's stream but for batch size and purpose."""
    return partial(
        TrainStream,
        dataset,
        crop=config.data.crop,
        augment=config.data.augment,
        seed=config.run.seed,
        mean=segmenter.recipe.mean,
        std=segmenter.recipe.std,
    )


class Supervised:
    """Random crops of the labelled source domain."""

    def __init__(self, config: Config, segmenter: Segmenter, source: SegmentationSet) -> None:
        self.config, self.segmenter = config, segmenter
        stream = _stream_of(config, segmenter, source)
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
        return self._pieces(self._probe.batch(iteration))

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        return (piece.to(self.segmenter.device) for piece in batch.pieces(self.config.data.batch_size))

    def journal(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is none."""


class Dacs(Supervised):
    """Self-training on unlabelled crops of the target domain (DACS, WACV 2021) beside the labelled source.

    After the warm-up an EMA teacher labels the target crops, ClassMix pastes half of the classes of a source crop onto
    each of them, and the mixture's loss is added. Of the target, images are all that is ever read.

    Args:
        config: with ``adapt``.
        segmenter: the student, with the weights that training starts from.
        source: labelled set.
        target: set that was opened without labels.
    """

    def __init__(self, config: Config, segmenter: Segmenter, source: SegmentationSet, target: SegmentationSet) -> None:
        super().__init__(config, segmenter, source)
        self.adapt = config.adapt
        self.teacher = Teacher(segmenter, config.adapt.ema)
        stream = _stream_of(config, segmenter, target)
        crops = stream(batch_size=config.data.batch_size, purpose="target")
        self._pairs = PairStream(self._stream, crops, warmup=config.adapt.warmup, seed=config.run.seed)
        self._target_probe = stream(batch_size=config.gate.samples, purpose="fisher target")
        self._seen: dict[str, list[float]] = {"mixed": [], "confident": []}

    def batches(self, start: int, stop: int) -> Iterator[DomainPair]:
        on_gpu = self.segmenter.device.type == "cuda"
        return self._pairs.loader(start, stop, self.config.data.workers, pin_memory=on_gpu)

    def terms(self, batch: DomainPair, iteration: int) -> list[Term]:
        pair = batch.to(self.segmenter.device, non_blocking=True)
        terms = super().terms(pair.source, iteration)
        if pair.target is None:
            return terms
        pseudo, likely = self.teacher.label(pair.target.image, pair.target.valid)
        weights = None
        if self.adapt.confidence is not None:
            sure = share_of_sure(likely, pair.target.valid, self.adapt.confidence)
            weights = torch.where(pair.pasted, 1.0, sure)
            self._seen["confident"].append(sure.item())
        losses = self.segmenter.loss(*mix_domains(pair, pseudo), weights=weights)
        self._seen["mixed"].append(losses.detach().float().mean().item())
        names = [f"{target} with {source}" for target, source in zip(pair.target.names, pair.source.names, strict=True)]
        return [*terms, Term("mixed", losses, names, self.adapt.weight)]

    def after_step(self, iteration: int) -> None:
        self.teacher.follow(iteration)

    def probe(self, iteration: int) -> Iterator[Batch]:
        source = super().probe(iteration)
        if iteration < self.adapt.warmup or self.adapt.fisher_domains == "source":
            return source
        # labelled here and now: once scoring has begun every site is on, which the teacher's gates are not
        return chain(source, [self._labelled(piece) for piece in self._pieces(self._target_probe.batch(iteration))])

    def _labelled(self, target: Batch) -> Batch:
        pseudo, _ = self.teacher.label(target.image, target.valid)
        return Batch(target.image, pseudo, target.names)

    def journal(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._seen.items() if values}
        self._seen = {name: [] for name in self._seen}
        return means

    def state(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state(), "seen": self._seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.teacher.load_state(state["teacher"])
        self._seen = {name: list(values) for name, values in state["seen"].items()}


def make_objective(
    config: Config, segmenter: Segmenter, source: SegmentationSet, unlabelled: SegmentationSet | None = None
) -> Objective:
    """The objective that a configuration asks for; without unlabelled images it is the source's alone."""
    if unlabelled is None:
        return Supervised(config, segmenter, source)
    return Dacs(config, segmenter, source, unlabelled)
