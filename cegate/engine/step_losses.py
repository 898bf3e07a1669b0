"""Losses of steps, read from the device when somebody asks, in one transfer for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from cegate.engine.team import Team
from cegate.errors import TrainingError
from cegate.tasks.task import Term


@dataclass(frozen=True)
class Found:
    """What the forward and backward pass of a step gives, besides gradients."""

    loss: Tensor
    """Scalar, without a graph."""
    terms: list[Term]

    def copy(self, names: Sequence[str]) -> Found:
        """One that outlives the next step; a recorded pass knows the names of its first batch only."""
        terms = [replace(term, losses=term.losses.detach().clone(), samples=list(names)) for term in self.terms]
        return Found(self.loss.clone(), terms)

    def samples(self) -> list[tuple[str, float]]:
        """(name, loss) of every sample of every term."""
        return [pair for term in self.terms for pair in zip(term.samples, term.losses.float().tolist(), strict=True)]


class NotFiniteError(TrainingError):
    """The loss of a step is NaN or infinite. The step was not made; where steps are recorded, and losses read later, it
    was, and nothing was saved since."""

    def __init__(self, iteration: int, samples: Sequence[tuple[str, float]]) -> None:
        self.iteration = iteration
        self.names, self.losses = [name for name, _ in samples], [loss for _, loss in samples]
        self.bad = [name for name, loss in samples if not math.isfinite(loss)]
        super().__init__(f"the loss of iteration {iteration} is not finite for {', '.join(self.bad)}")


class StepLosses:
    """Sum and number of the losses since the last line of the journal.

    Args:
        team: whose samples a loss is the mean of.
    """

    def __init__(self, team: Team) -> None:
        self.team = team
        self.sum, self.count = 0.0, 0
        self.last: float | None = None
        """The newest that was read."""
        self._unread: list[tuple[int, Found]] = []

    def add(self, iteration: int, found: Found) -> int:
        """Take one that is not read yet; how many are not."""
        self._unread.append((iteration, found))
        return len(self._unread)

    def read(self) -> None:
        """Read those that are not. Every process of the team calls it.

        Raises:
            NotFiniteError: one is NaN or infinite.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        sums = self.team.sum(torch.stack([found.loss for _, found in unread]).double())
        for value, (iteration, found) in zip((sums / self.team.size).tolist(), unread, strict=True):
            if not math.isfinite(value):
                raise NotFiniteError(iteration, list(chain.from_iterable(self.team.gather(found.samples()))))
            self.sum, self.count, self.last = self.sum + value, self.count + 1, value

    def take_mean(self) -> float:
        """Their mean; begins anew."""
        self.read()
        mean = self.sum / self.count
        self.sum, self.count = 0.0, 0
        return mean
