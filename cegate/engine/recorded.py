"""The forward and backward pass of a step as one recorded graph, played again for every batch until the plan changes.

A gated step of a large ViT is thousands of small kernels, and Python takes longer to launch them than a GPU to run them
(docs/explanation/performance.md). Recorded once, all of them are launched by one call. What is recorded must be the
same work on every batch and stay on the device: a task says so of itself (`Task.recordable`), and so does a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from cegate.backbone.frozen import Cast, reading
from cegate.tasks.stream import StepData

log = logging.getLogger(__name__)

T = TypeVar("T")


class Graph(Protocol):
    """Work that is recorded once and played again, on the same tensors."""

    def record(self, work: Callable[[], T]) -> T:
        """What the work gives: tensors that hold nothing until `play`."""

    def play(self) -> None:
        """Do the work on what its tensors hold now."""


class CudaGraph:
    """A graph of the current CUDA device."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], T]) -> T:
        with torch.cuda.graph(self._graph):
            return work()

    def play(self) -> None:
        self._graph.replay()


class Pass:
    """A step's forward and backward pass: as it is written, or recorded.

    With every plan the first pass runs as it is written, which compiles kernels and fills caches; the second one is
    recorded. Gradients of a recorded pass always lie in the same tensors, so nobody may put others in their place; each
    play overwrites them.

    Args:
        work: what a step needs, on the device -> what it gives; leaves the gradients on the weights.
        graph: makes a graph; None: nothing is recorded.
        cast: what a recorded pass reads in place of frozen weights.
    """

    def __init__(
        self,
        work: Callable[[StepData], T],
        graph: Callable[[], Graph] | None = None,
        cast: Callable[[], Cast] = dict,
    ) -> None:
        self.work, self.graph, self.cast = work, graph, cast
        self.forget()

    @property
    def records(self) -> bool:
        """Whether passes are recorded at all."""
        return self.graph is not None

    @property
    def is_recorded(self) -> bool:
        """Whether the last pass was played."""
        return self._played is not None

    def forget(self) -> None:
        """Before another plan: the next pass runs as it is written."""
        self._has_run, self._played = False, None

    def __call__(self, data: StepData) -> T:
        """Gradients of a step. Those of the weights must be None before, unless the last pass was played."""
        if self.graph is None or not self._has_run:
            self._has_run = True
            return self.work(data)
        if self._played is None:
            still = replace(data, source=data.source.clone())
            graph, cast = self.graph(), self.cast()
            try:
                with reading(cast):
                    found = graph.record(lambda: self.work(still))
            except RuntimeError as error:
                log.warning("run.speed=auto: steps go on as they are written, for recording one failed: %s", error)
                self.graph = None
                return self.work(data)
            self._played = graph, still, found, cast  # cast lives as long as the graph that reads it
        graph, still, found, _ = self._played
        still.source.fill(data.source)
        graph.play()
        return found
