"""What training minimises: a list of tasks."""

from __future__ import annotations

from typing import Protocol

from cegate.config import Config
from cegate.data.sets import SegmentationSet
from cegate.segmenter import Segmenter
from cegate.tasks.crossearth import crossearth_tasks
from cegate.tasks.dacs import Dacs
from cegate.tasks.modalities import LoseModality
from cegate.tasks.segmentation import Segmentation
from cegate.tasks.stream import Share
from cegate.tasks.task import Task


class TrainingSets(Protocol):
    """The sets that tasks read."""

    source: SegmentationSet
    unlabelled: SegmentationSet | None


def build_tasks(
    config: Config, network: Segmenter, sets: TrainingSets, *, adapting: bool = True, share: Share = range
) -> list[Task]:
    """The tasks of a stage, in the order in which they prepare their views; supervised segmentation is the first.

    Args:
        config: the run.
        network: on its device, with the weights that training starts from.
        sets: the data.
        adapting: False in the stage of frozen backbone + head, which knows the source's labels alone.
        share: slots of a batch that this process takes.
    """
    tasks: list[Task] = [Segmentation(config, network, sets.source, share)]
    if config.modal.dropout and "streams" in network.parts():
        tasks.append(LoseModality(network.parts()["streams"].bands, config.modal.dropout))
    if not adapting:
        return tasks
    tasks += crossearth_tasks(config, network, sets.source)
    if sets.unlabelled is not None:
        tasks.append(Dacs(config, network, sets.unlabelled, share))
    return tasks
