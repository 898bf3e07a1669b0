"""Styling as a task: in some iterations the segmentation sees a styled image in place of its own (CrossEarth, 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cegate.draws import generator
from cegate.errors import ConfigError
from cegate.masks import BlockMask
from cegate.style.injection import EarthStyleInjection
from cegate.tasks.task import Step, Term, View

Draw = Literal["iteration", "sample"]


class Styling:
    """Replaces the view "image" by ``X_S``, with a probability; labels stay, and there is no loss of its own.

    Whether an iteration is styled, in which blocks and how is a function of (seed, iteration, slot): a run that was killed
    goes on within a styled iteration as if nothing had been.

    Args:
        injection: what styles; it has no weights to train.
        mask: which blocks; with its own ratio and block, drawn apart from that of masked images.
        seed: of the run.
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
        seed: int,
        probability: float = 0.1,
        draw: Draw = "iteration",
    ) -> None:
        if not 0 <= probability <= 1:
            raise ConfigError(f"style.probability={probability} is no probability; use 0 (never) to 1 (always)")
        self.injection, self.mask, self.seed = injection, mask, seed
        self.probability, self.draw = probability, draw
        self._styled, self._seen = 0, 0  # samples since the last line of the journal

    def fires(self, iteration: int, slots: Sequence[int]) -> Tensor:
        """Which samples of an iteration are styled, [B] bool on the CPU."""
        numbers = [(iteration, slot) if self.draw == "sample" else (iteration,) for slot in slots]
        return torch.tensor([generator(self.seed, "styled", *own).random() < self.probability for own in numbers])

    def parts(self) -> dict[str, nn.Module]:
        """Nothing is trained."""
        return {}

    def prepare(self, step: Step) -> None:
        """Put ``X_S`` where the samples that are drawn were."""
        fired = self.fires(step.iteration, step.slots)
        self._styled, self._seen = self._styled + int(fired.sum()), self._seen + len(fired)
        if not fired.any():
            return
        images = step.views["image"].images
        rows = fired.nonzero()[:, 0]
        slots = [step.slots[row] for row in rows.tolist()]
        kept = self.mask.draw(tuple(images.shape[-2:]), self.seed, step.iteration, slots)
        drawn = self.injection.draw(self.seed, step.iteration, slots)
        rows = rows.to(images.device)
        styled = self.injection(images[rows], kept, drawn)
        step.views["image"] = View(images.index_copy(0, rows, styled.to(images.dtype)))

    def terms(self, step: Step) -> list[Term]:
        """The segmentation loss is the segmentation's."""
        return []

    def after_step(self, iteration: int) -> None:
        """Nothing follows the optimiser."""

    def journal(self) -> dict[str, float]:
        """Share of the samples since the last line that were styled."""
        share = {"styled": self._styled / self._seen} if self._seen else {}
        self._styled = self._seen = 0
        return share

    def state(self) -> dict[str, Any]:
        """The counts of the journal; every draw is a function of numbers."""
        return {"styled": self._styled, "seen": self._seen}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._styled, self._seen = state["styled"], state["seen"]
