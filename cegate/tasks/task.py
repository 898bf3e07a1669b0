"""A task: a loss, with parts and a state of its own. Training runs a list of tasks, none of which knows another.

In an iteration every task prepares views (batches of images), each view is encoded, and every task gives its terms.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cegate.backbone.backbone import Features
from cegate.config import IGNORE
from cegate.data.stream import Batch
from cegate.segmenter import Segmenter

Draw = Callable[[int, Batch], Any]
"""(iteration, source crops) -> what a task needs besides; runs in the data workers, so it holds no model. What it gives
is None, or has ``to(device, non_blocking=)`` and ``pin_memory()``."""


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
    """Images of a step that go through the network."""

    images: Tensor
    """[B, C, H, W] float32, normalised."""
    labels: Tensor | None = None
    """[B, H, W] int64, 255 ignored; None for a view that has no semantic loss."""
    weights: Tensor | None = None
    """[B, H, W] how much each pixel counts; None: 1."""
    names: tuple[str, ...] = ()
    """Of the samples."""
    beside: str | None = None
    """View of equal height and width that shares one pass of the network; None: a pass of its own."""
    plain: bool = False
    """Encoded without what parts plug in for one call (injectors at blocks)."""


@dataclass
class Step:
    """What an iteration works on, from hand to hand of the tasks."""

    iteration: int
    batch: Batch
    """Labelled crops of the source domain, on the device."""
    network: Segmenter
    seed: int
    drawn: Mapping[str, Any] = field(default_factory=dict)
    """Task -> what its `Task.draws` gave, on the device."""
    slots: range | None = None
    """Numbers of the samples within the batch of all processes; default: 0..B-1."""
    views: dict[str, View] = field(default_factory=dict)
    clean: bool = False
    """Of a Fisher probe: samples as they are, and nothing of it is told to the journal."""
    run: Callable[..., Features] | None = None
    """In place of the network's `encode`."""
    features: dict[str, Features] = field(default_factory=dict)
    """View -> what the backbone makes of it, once `encode` has run; the network's neck has not seen it yet."""

    def __post_init__(self) -> None:
        self.slots = range(len(self.batch)) if self.slots is None else self.slots

    def rng(self, purpose: str, slot: int = -1) -> np.random.Generator:
        """Draws of one slot, or (-1) of the whole iteration; no purpose disturbs another, nor torch's own generator."""
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode()), self.iteration, slot + 1])

    def encode(self) -> None:
        """Run the network over every view, in the order in which they were added."""
        run, calls = self.run or self.network.encode, {}
        for name, view in self.views.items():
            calls.setdefault(view.beside or name, []).append(name)
        for leader, names in calls.items():
            assert leader in names and self.views[leader].beside is None, f"views {names} are beside none that leads"
            images = [self.views[name].images for name in names]
            whole = self.network.whole_images(images[0] if len(images) == 1 else torch.cat(images))
            features = run(whole, plain=self.views[leader].plain)
            for name, part in zip(names, features.split([len(batch) for batch in images]), strict=True):
                self.features[name] = part

    def loss(self, view: str) -> Tensor:
        """Semantic loss of each sample of a view, [B]."""
        shown, network = self.views[view], self.network
        weights = None if shown.weights is None else network.whole_patches(shown.weights, 0.0)
        features = network.neck(self.features[view], network.whole_images(shown.images))
        return network.loss_of(features, network.whole_patches(shown.labels, IGNORE), weights)


class Task(Protocol):
    """What training minimises. Every draw is a function of (seed, iteration, slot), so that a resumed run goes on
    exactly, and so that tasks do not disturb one another."""

    name: str
    recordable: bool = False
    """Whether all it does in a step, but `draws`, is the same work on every batch and stays on the device, with a loss
    of every sample of the batch in each term; `run.speed`."""
    scored: bool = False
    """Whether its terms are part of the likelihood of a labelled sample as it is (gate.loss: all)."""

    def parts(self) -> dict[str, nn.Module]:
        """What it trains besides the network: in the optimiser and the checkpoint, in no adapter folder."""
        return {}

    def draws(self) -> Draw | None:
        """What data workers prepare for it."""
        return None

    def prepare(self, step: Step) -> None:
        """Add views, or replace those of tasks before it in the list."""

    def terms(self, step: Step) -> list[Term]:
        """Its losses, from the encoded views."""
        return []

    def after_step(self, iteration: int) -> None:
        """The optimiser has done the step of an iteration."""

    def probe(self, iteration: int) -> Iterable[Batch]:
        """Labelled samples that it gives to a Fisher probe, in pieces of the training batch size, on the device. What
        needs the plan as it is must be computed before this returns: in scoring, every site is on."""
        return ()

    def journal(self) -> dict[str, float]:
        """What the next line of the journal says besides the loss: means since the last one."""
        return {}

    def pictures(self, step: Step) -> dict[str, Tensor]:
        """Title -> [B, C, H, W], normalised: what it makes of the images of a step that is not trained on."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, but for the weights of its parts."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class CleanLoss:
    """Loss of labelled samples as they are, with what every task that is scored asks of them; for Fisher scores.

    Args:
        tasks: of the stage.
        step: makes a step of a batch and the slots of its samples.
        first: slot of the first sample; the batches follow one another.
    """

    def __init__(self, tasks: Sequence[Task], step: Callable[[Batch, range], Step], first: int = 0) -> None:
        self.tasks, self.step, self.next = [task for task in tasks if task.scored], step, first

    @property
    def views(self) -> int:
        """How often a sample is in the one pass through the network."""
        return len(self.tasks)

    def __call__(self, batch: Batch) -> Tensor:
        """[B], of each sample alone."""
        slots = range(self.next, self.next + len(batch))
        self.next = slots.stop
        step = self.step(batch, slots)
        for task in self.tasks:
            task.prepare(step)
        assert all(view.beside == "image" for name, view in step.views.items() if name != "image"), "more passes than 1"
        step.encode()
        return torch.stack([t.weight * t.losses for task in self.tasks for t in task.terms(step)]).sum(0)


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Initial weights made inside depend on (seed, purpose) alone, and nothing outside notices."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(1)[0]))
        yield
