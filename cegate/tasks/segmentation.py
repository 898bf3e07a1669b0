"""Supervised segmentation of the source domain."""

from __future__ import annotations

from collections.abc import Iterator

from cegate.config import Config
from cegate.data.sets import SegmentationSet
from cegate.data.stream import Batch
from cegate.segmenter import Segmenter
from cegate.tasks.stream import Probes, Share, crops_of
from cegate.tasks.task import Step, Task, Term, View


class Segmentation(Task):
    """Random crops of the labelled source domain, as view ``image``.

    Args:
        config: sizes and seed.
        network: what learns.
        source: labelled set.
        share: slots of a probe that this process takes.
    """

    name = "segmentation"
    scored = True

    def __init__(self, config: Config, network: Segmenter, source: SegmentationSet, share: Share = range) -> None:
        self.network, self.piece = network, config.data.batch_size
        self.probes = Probes(config, crops_of(config, network, source, config.gate.samples, "fisher", share))

    @property
    def recordable(self) -> bool:
        """Where its head is."""
        return self.network.head.recordable

    def prepare(self, step: Step) -> None:
        batch = step.batch
        step.views["image"] = View(batch.image, batch.label, names=tuple(batch.names))

    def terms(self, step: Step) -> list[Term]:
        return [Term("source", step.loss("image"), list(step.views["image"].names))]

    def probe(self, iteration: int) -> Iterator[Batch]:
        pieces = self.probes.batch(iteration).pieces(self.piece)
        return (piece.to(self.network.device) for piece in pieces)
