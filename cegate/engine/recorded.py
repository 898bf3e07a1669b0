"""Forward and backward passes as recorded graphs, played again for every batch until the plan changes.

A gated step of a large ViT is thousands of small kernels, and Python takes longer to launch them than a GPU to run them
(docs/explanation/performance.md). Recorded once, all of them are launched by one call. What is recorded must be the
same work on every batch and stay on the device: a task says so of itself (`Task.recordable`), and so does a head. Then
a whole step is recorded (`Pass`), else its backbone alone (`Encoder`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from cegate.backbone.backbone import Features
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
        # threads that pin memory, or watch NCCL, go on meanwhile
        capture = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
        # around it, for one that fails leaves its own stream the current one
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            return work()

    def play(self) -> None:
        self._graph.replay()


class Pass:
    """A step's forward and backward pass: as it is written, or recorded.

    With every plan the first pass runs as it is written, which compiles kernels and fills caches; the second one is
    recorded. Gradients of a recorded pass always lie in the same tensors, so nobody may put others in their place; each
    play overwrites them.

    Args:
        work: what a step needs, on the device -> what it gives; leaves its gradients on the weights, and no others.
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
        self.records = graph is not None
        """Whether passes are meant to be recorded: the same in every process of a team, though one of them may fail."""
        self.forget()

    @property
    def is_recorded(self) -> bool:
        """Whether the last pass was played."""
        return self._played is not None

    def forget(self) -> None:
        """Before another plan: the next pass runs as it is written."""
        self._has_run, self._played = False, None

    def __call__(self, data: StepData) -> T:
        """What the work gives, and its gradients on the weights."""
        if self.graph is None or not self._has_run:
            self._has_run = True
            return self.work(data)
        if self._played is None and not self._record(data):
            return self.work(data)  # not inside `except`: there the error holds what recording has allocated
        graph, still, found, _ = self._played
        still.source.fill(data.source)
        graph.play()
        return found

    def _record(self, data: StepData) -> bool:
        still = replace(data, source=data.source.clone())
        try:
            graph, cast = self.graph(), self.cast()
            with reading(cast):
                found = graph.record(lambda: self.work(still))
        except RuntimeError as error:
            log.warning("run.speed=auto: steps go on as they are written, for recording one failed: %s", error)
            self.graph = None
            return False
        self._played = graph, still, found, cast  # cast lives as long as the graph that reads it
        return True


class Encoder:
    """The backbone's part of steps that cannot be recorded whole.

    With every plan a pass of one kind (which of a step, of what size) runs as it is written first; the second one is
    recorded, forward and backward. Features and gradients of a recorded pass always lie in the same tensors, until it
    is played in the next step.

    Args:
        encode: ``(images, plain=...)`` -> features.
        weights: what may learn in it.
        graph: makes a graph.
        cast: what a recorded pass reads in place of frozen weights.
    """

    def __init__(
        self,
        encode: Callable[..., Features],
        weights: Callable[[], Iterable[nn.Parameter]],
        graph: Callable[[], Graph],
        cast: Callable[[], Cast] = dict,
    ) -> None:
        self.encode, self.weights, self.graph, self.cast = encode, weights, graph, cast
        self.fails = False
        self.forget()

    def forget(self) -> None:
        """Before another plan: the next passes run as they are written."""
        self._passes: dict[tuple, _Encoded | None] = {}
        self._cast: Cast | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether a pass is recorded."""
        return any(self._passes.values())

    def of_a_step(self) -> Callable[..., Features]:
        """``encode`` for the passes of one step, in their order."""
        count = 0

        def encode(images: Tensor, *, plain: bool = False) -> Features:
            nonlocal count
            key = (count, images.shape, images.requires_grad, plain)  # a prompt in them may learn
            count += 1
            if self.fails or key not in self._passes:
                self._passes[key] = None
                return self.encode(images, plain=plain)
            if self._passes[key] is None and not self._record(key, images):
                return self.encode(images, plain=plain)
            return self._passes[key](images)

        return encode

    def _record(self, key: tuple, images: Tensor) -> bool:
        learning = [w for w in self.weights() if w.requires_grad]
        try:
            self._cast = cast = self.cast() if self._cast is None else self._cast  # one for all passes
            with reading(cast), _uncached_casts():
                self._passes[key] = _Encoded(
                    lambda still: self.encode(still, plain=key[-1]), images, learning, self.graph
                )
        except RuntimeError as error:
            log.warning("run.speed=auto: steps go on as they are written, for recording one failed: %s", error)
            self.fails = True
            self.forget()  # what the others hold may be what was lacking
            return False
        self._passes[key].cast = cast  # lives as long as the graphs that read it
        return True


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps a weight's cast for the rest of a step; what a graph casts is its own."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


class _Encoded:
    """One recorded pass, forward and backward apart, as a node of whatever graph of gradients it becomes part of."""

    cast: Cast

    def __init__(
        self,
        encode: Callable[[Tensor], Features],
        images: Tensor,
        weights: Sequence[nn.Parameter],
        graph: Callable[[], Graph],
    ) -> None:
        self.images = images.detach().clone().requires_grad_(images.requires_grad)
        self.learning = [*([self.images] if images.requires_grad else []), *weights]
        self.weights = list(weights)
        self.forward, self.backward = graph(), graph()

        def run() -> tuple[Tensor, ...]:
            features = encode(self.images)
            self.grid, queries = features.grid, features.queries
            self.found = (*features.maps, *([] if queries is None else [queries]))
            self.count = len(features.maps)
            return self.found

        def differentiate() -> tuple[Tensor | None, ...]:
            outputs = [output for output in self.found if output.requires_grad]
            return torch.autograd.grad(outputs, self.learning, list(self.given.values()), allow_unused=True)

        self.still = self.forward.record(run)
        self.given = {k: torch.zeros_like(output) for k, output in enumerate(self.still) if output.requires_grad}
        self.gradients = self.backward.record(differentiate) if self.given else ()

    def __call__(self, images: Tensor) -> Features:
        found = _Played.apply(self, images, *self.weights)
        queries = found[self.count] if len(found) > self.count else None
        return Features(list(found[: self.count]), self.grid, queries)


class _Played(torch.autograd.Function):
    @staticmethod
    def forward(ctx, encoded: _Encoded, images: Tensor, *weights: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.encoded = encoded
        encoded.images.copy_(images)
        encoded.forward.play()
        found = tuple(output.detach() for output in encoded.still)
        ctx.mark_non_differentiable(*(output for k, output in enumerate(found) if k not in encoded.given))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        encoded = ctx.encoded
        for k, given in encoded.given.items():
            given.copy_(gradients[k])
        encoded.backward.play()
        found = [None if gradient is None else gradient.detach() for gradient in encoded.gradients]
        return None, *([] if encoded.images.requires_grad else [None]), *found
