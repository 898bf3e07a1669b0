"""Modality dropout as a task: some samples lose a modality, so that the model learns to do without."""

from __future__ import annotations

from dataclasses import replace

import torch

from cegate.draws import generator
from cegate.parts.streams import choose_lost, lose_modality
from cegate.tasks.task import Step, Task


class LoseModality(Task):
    """Replaces the view "image" by one in which some samples do not know a modality; there is no loss of its own.

    Which sample loses which is a function of (seed, iteration, slot).

    Args:
        bands: of each modality.
        probability: that a sample loses one.
    """

    name = "modality"

    def __init__(self, bands: tuple[int, ...], probability: float) -> None:
        self.bands, self.probability = bands, probability

    def prepare(self, step: Step) -> None:
        drawn = [generator(step.seed, "modality", step.iteration, slot).random() for slot in step.slots]
        lost = choose_lost(torch.tensor(drawn), self.probability, len(self.bands))
        view = step.views["image"]
        step.views["image"] = replace(view, images=lose_modality(view.images, self.bands, lost))
