"""Self-training on unlabelled crops of the target domain (DACS, WACV 2021): a teacher's labels, mixed by ClassMix."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cegate.checkpoint import trained_weights
from cegate.config import IGNORE, Config
from cegate.data.sets import SegmentationSet
from cegate.data.stream import Batch, TrainStream
from cegate.data.transforms import draw_class_mask
from cegate.segmenter import Segmenter
from cegate.tasks.stream import Probes, Share, crops_of
from cegate.tasks.task import Step, Task, Term, View


class Dacs(Task):
    """The mixture's loss, beside that of the labelled source.

    After the warm-up an EMA teacher labels the target crops, ClassMix pastes half of the classes of a source crop onto
    each of them, and the mixture becomes view ``mixed``. Of the target, images are all that is ever read.

    Args:
        config: with ``adapt``.
        network: the student, with the weights that training starts from.
        target: set that was opened without labels.
        share: slots of a batch that this process takes.
    """

    name = "dacs"

    def __init__(self, config: Config, network: Segmenter, target: SegmentationSet, share: Share = range) -> None:
        self.adapt, self.network, self.piece = config.adapt, network, config.data.batch_size
        self.teacher = Teacher(network, config.adapt.ema)
        crops = crops_of(config, network, target, config.data.batch_size, "target", share)
        self._pasting = Pasting(crops, warmup=config.adapt.warmup, seed=config.run.seed)
        self._probes = Probes(config, crops_of(config, network, target, config.gate.samples, "fisher target", share))
        self._seen: dict[str, list[float]] = {"mixed": [], "confident": []}

    def draws(self) -> Pasting:
        return self._pasting

    def prepare(self, step: Step) -> None:
        drawn: Pasted | None = step.drawn[self.name]
        if drawn is None:
            return
        target, source = drawn.target, step.batch
        pseudo, likely = self.teacher.label(target.image, target.valid)
        weights = None
        if self.adapt.confidence is not None:
            sure = share_of_sure(likely, target.valid, self.adapt.confidence)
            weights = torch.where(drawn.pasted, 1.0, sure)
            self._seen["confident"].append(sure.item())
        names = tuple(f"{one} with {other}" for one, other in zip(target.names, source.names, strict=True))
        step.views["mixed"] = View(*mix_domains(source, drawn, pseudo), weights, names)

    def terms(self, step: Step) -> list[Term]:
        if "mixed" not in step.views:
            return []
        losses = step.loss("mixed")
        self._seen["mixed"].append(losses.detach().float().mean().item())
        return [Term("mixed", losses, list(step.views["mixed"].names), self.adapt.weight)]

    def after_step(self, iteration: int) -> None:
        self.teacher.follow(iteration)

    def probe(self, iteration: int) -> list[Batch]:
        if iteration < self.adapt.warmup or self.adapt.fisher_domains == "source":
            return []
        pieces = self._probes.batch(iteration).pieces(self.piece)
        return [self._labelled(piece.to(self.network.device)) for piece in pieces]

    def _labelled(self, target: Batch) -> Batch:
        pseudo, _ = self.teacher.label(target.image, target.valid)
        return Batch(target.image, pseudo, target.names)

    def journal(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._seen.items() if values}
        self._seen = {name: [] for name in self._seen}
        return means

    def state(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state(), "seen": self._seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.teacher.load_state(state["teacher"])
        self._seen = {name: list(values) for name, values in state["seen"].items()}


@dataclass(frozen=True)
class Pasted:
    """Target crops, one for each source crop of an iteration, and what is pasted onto them."""

    target: Batch
    """Without labels."""
    pasted: Tensor
    """[B, H, W] bool: pixels of the source crops."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Pasted:
        """The crops on another device."""
        target = self.target.to(device, non_blocking=non_blocking)
        return Pasted(target, self.pasted.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Pasted:
        """The crops in page-locked memory."""
        return Pasted(self.target.pin_memory(), self.pasted.pin_memory())


class Pasting:
    """Draws, after a warm-up, a target crop for each source crop and the classes that are pasted onto it.

    Both sets are gone through in their own shuffled order, the smaller one more often.

    Args:
        target: as many crops as the source has.
        warmup: first iteration with a target.
        seed: decides on the pasted classes, beside iteration and slot.
    """

    def __init__(self, target: TrainStream, *, warmup: int, seed: int) -> None:
        self.target, self.warmup = target, warmup
        self._key = (seed, zlib.crc32(b"classmix"))

    def __call__(self, iteration: int, source: Batch) -> Pasted | None:
        if iteration < self.warmup:
            return None
        masks = [
            draw_class_mask(label, np.random.default_rng([*self._key, iteration, slot]))
            for slot, label in zip(self.target.slots, source.label.numpy(), strict=True)
        ]
        return Pasted(self.target.batch(iteration), torch.from_numpy(np.stack(masks)))


class Teacher:
    """A second set of a network's trained weights; backbone and gate plan are the student's own.

    Nothing of the frozen backbone is held twice (a tuned one is learned, so it has a running mean too). Because the
    plan is shared, a site that is switched off is off for both; its weights go on approaching the student's.

    Args:
        network: the student; the teacher starts as its equal.
        ema: largest share of its old weights that the teacher keeps in one iteration.
    """

    def __init__(self, network: Segmenter, ema: float) -> None:
        self.network, self.ema = network, ema
        self.weights = {name: value.clone() for name, value in trained_weights(network).items()}

    def follow(self, iteration: int) -> None:
        """Move towards the student, after its step of an iteration t >= 0, and keep the share
        ``min(1 - 1 / (t + 1), ema)``; after the first step the two are equal."""
        average = get_ema_multi_avg_fn(min(1 - 1 / (iteration + 1), self.ema))
        average(list(self.weights.values()), list(trained_weights(self.network).values()), None)

    @torch.no_grad()
    def label(self, images: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels: the likeliest class of every pixel, in evaluation mode. Draws nothing at random.

        Args:
            images: [B, bands, H, W] normalised float32.
            valid: [B, H, W] bool, where there is something to label.

        Returns:
            label [B, H, W] int64, 255 where not valid, and how likely it is, [B, H, W] float32.
        """
        student = self.network
        was_training = student.training
        student.eval()
        try:
            logits = functional_call(student, self.weights, (images,))
        finally:
            student.train(was_training)
        share, label = logits.float().softmax(1).max(1)
        return label.masked_fill(~valid, IGNORE), share

    def state(self) -> dict[str, Tensor]:
        """The weights, for a checkpoint."""
        return self.weights

    def load_state(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from the weights of a checkpoint of the same model."""
        for name, value in self.weights.items():
            value.copy_(weights[name])


def mix_domains(source: Batch, drawn: Pasted, pseudo: Tensor) -> tuple[Tensor, Tensor]:
    """ClassMix across domains: the chosen classes of each source crop pasted onto the target crop of its slot.

    Colours are not changed once more, as DACS does with the mixture: the paper's recipe names no such step, and each
    half has had its own photometric change in the stream.

    Args:
        source: labelled crops.
        drawn: the target's, and what is pasted.
        pseudo: [B, H, W] int64 label of the target crops, 255 ignored.

    Returns:
        image [B, C, H, W] and label [B, H, W].
    """
    image = torch.where(drawn.pasted[:, None], source.image, drawn.target.image)
    return image, torch.where(drawn.pasted, source.label, pseudo)


def share_of_sure(likely: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Share [] of a batch's valid pixels [B, H, W] whose class is at least as likely as the threshold; 0 without any.

    What the target's pixels of a mixture weigh in DACS; those of the source, whose labels are true, weigh 1.
    """
    return ((likely >= threshold) & valid).sum() / valid.sum().clamp(min=1)
