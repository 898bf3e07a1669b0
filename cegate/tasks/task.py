"""What a task is: a loss with its own parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from cegate.data.stream import Batch


@dataclass(frozen=True)
class Term:
    """One part of the loss of an iteration, which is the sum over terms of weight x mean of losses."""

    name: str
    losses: Tensor
    """[n], of each sample alone."""
    samples: list[str]
    """Their names."""
    weight: float = 1.0


@dataclass(frozen=True)
class View:
    """Images that are encoded in this iteration."""

    images: Tensor
    """[B, C, H, W], normalised."""
    plain: bool = False
    """Leave out what is injected, at blocks and at outputs."""


@dataclass
class Step:
    """What one iteration works on."""

    iteration: int
    batch: Batch
    network: Any
    slots: Sequence[int]
    """Of the samples, over all processes."""
    views: dict[str, View] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    """View -> encoded maps, once all tasks have prepared."""


class Task(Protocol):
    """A loss with its own parts."""

    name: str

    def parts(self) -> dict[str, nn.Module]: ...
    def prepare(self, step: Step) -> None: ...
    def terms(self, step: Step) -> list[Term]: ...
    def after_step(self, iteration: int) -> None: ...
    def journal(self) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
