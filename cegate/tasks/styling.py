"""Styling as a task: in some iterations the segmentation sees a styled image in place of its own (CrossEarth, 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from cegate.draws import generator
from cegate.errors import ConfigError
from cegate.masks import BlockMask
from cegate.style.injection import EarthStyleInjection
from cegate.tasks.task import Step, Task

Draw = Literal["iteration", "sample"]


class Styling(Task):
    """Replaces the view "image" by ``X_S``, with a probability; labels stay, and there is no loss of its own.

    Whether an iteration is styled, in which blocks and how is a function of (seed, iteration, slot): a run that was
    killed goes on within a styled iteration as if nothing had been.

    Args:
        injection: what styles; it has no weights to train.
        mask: which blocks; with its own ratio and block, drawn apart from that of masked images.
        probability: that an iteration (or a sample) is styled.
        draw: ``iteration`` draws once for all samples of an iteration, ``sample`` for each.

    Raises:
        ConfigError: the probability is out of range.
    """

    name = "style"

    def __init__(
        self,
        injection: EarthStyleInjection,
        mask: BlockMask,
        *,
        probability: float = 0.1,
        draw: Draw = "iteration",
    ) -> None:
        if not 0 <= probability <= 1:
            raise ConfigError(f"style.probability={probability} is no probability; use 0 (never) to 1 (always)")
        self.injection, self.mask = injection, mask
        self.probability, self.draw = probability, draw
        self._styled, self._seen = 0, 0  # samples since the last line of the journal

    def fires(self, step: Step) -> Tensor:
        """Which samples of an iteration are styled, [B] bool on the CPU."""
        numbers = [(step.iteration, slot) if self.draw == "sample" else (step.iteration,) for slot in step.slots]
        return torch.tensor([generator(step.seed, "styled", *own).random() < self.probability for own in numbers])

    def prepare(self, step: Step) -> None:
        """Put ``X_S`` where the samples that are drawn were."""
        fired = self.fires(step)
        self._styled, self._seen = self._styled + int(fired.sum()), self._seen + len(fired)
        if not fired.any():
            return
        view = step.views["image"]
        rows = fired.nonzero()[:, 0]
        slots = [step.slots[row] for row in rows.tolist()]
        rows = rows.to(view.images.device)
        styled = self._styled_images(view.images[rows], step, slots)
        images = view.images.index_copy(0, rows, styled.to(view.images.dtype))
        step.views["image"] = replace(view, images=images)

    def _styled_images(self, images: Tensor, step: Step, slots: Sequence[int]) -> Tensor:
        kept = self.mask.draw(tuple(images.shape[-2:]), step.seed, step.iteration, slots)
        return self.injection(images, kept, self.injection.draw(step.seed, step.iteration, slots))

    def pictures(self, step: Step) -> dict[str, Tensor]:
        """Every sample styled."""
        return {"styled": self._styled_images(step.batch.image, step, step.slots)}

    def journal(self) -> dict[str, float]:
        """Share of the samples since the last line that were styled."""
        share = {"styled": self._styled / self._seen} if self._seen else {}
        self._styled = self._seen = 0
        return share

    def state(self) -> dict[str, Any]:
        """The counts of the journal, and the spread of styles: where it was measured on the source it is kept, not
        measured anew. Every draw is a function of numbers."""
        mean, factor = (torch.from_numpy(values) for values in self.injection.spread)
        return {"styled": self._styled, "seen": self._seen, "mean": mean, "factor": factor}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on counting, with the styles as they were spread."""
        self._styled, self._seen = state["styled"], state["seen"]
        self.injection.spread = (state["mean"].numpy(), state["factor"].numpy())
