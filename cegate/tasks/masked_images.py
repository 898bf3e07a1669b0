"""Masked images as a task: restore an image from the features of what is left of it (CrossEarth, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.losses import at_least_float32
from cegate.masks import BlockMask, inside
from cegate.parts.restore import DecoderName, build_decoder
from cegate.parts.visual_prompt import Mode, VisualPrompt
from cegate.tasks.styling import Styling
from cegate.tasks.task import Step, Task, Term, View, seeded

LARGEST_PX = 512
"""Side of the restored image; a larger crop is compared at this size."""
Loss = Literal["mse", "l1"]
Target = Literal["clean", "input"]


class MaskedImages(Task):
    """The view "masked", ``X_M``, and what its restoration costs; with styling also that of ``X_S`` and how the two
    agree.

    Terms, each a mean over a sample's pixels and bands: ``mim``, d(X_M restored, X); for styled samples ``mim_styled``,
    d(X_S restored, X), and ``style_consistency``, |X_M restored - X_S restored|. Their weights make each the mean over
    the whole batch, 0 where a sample is not styled. What a small picture is filled up with does not count.

    Features come from the backbone alone, without injection. Nothing is drawn from torch's generators, so a
    segmentation loss beside it draws the same as without it.

    Args:
        channels: C of the four maps.
        bands: of the images; all of them are restored.
        crop: side of a training crop.
        seed: of the run, for the first weights of the decoder.
        mask: which blocks are hidden.
        decoder, prompt: see :mod:`cegate.parts.restore` and :mod:`cegate.parts.visual_prompt`.
        loss: ``mse``, or ``l1`` (CASID).
        target: ``clean`` compares with X, ``input`` with what the backbone was given.
        styling: of the same run, standing before this task; None: no image is styled.
        separate: encode styled images once more without injection; needed where injection is at blocks.
    """

    name = "mim"
    scored = True

    def __init__(
        self,
        mask: BlockMask,
        *,
        channels: int,
        bands: int,
        crop: int,
        seed: int,
        decoder: DecoderName = "per_level",
        prompt: Mode = "fill",
        loss: Loss = "mse",
        target: Target = "clean",
        styling: Styling | None = None,
        separate: bool = False,
    ) -> None:
        self.mask, self.loss, self.target = mask, loss, target
        self.styling, self.separate = styling, separate
        self._seen: dict[str, tuple[Tensor | float, int]] = {}  # term -> sum and number of losses since the last line
        self.prompt = VisualPrompt(bands, crop, prompt)
        with seeded(seed, "mim"):
            self.decoder = build_decoder(decoder, channels, bands)

    def parts(self) -> dict[str, nn.Module]:
        """Visual prompt and decoder; neither is deployed."""
        return {"prompt": self.prompt, "decoder": self.decoder}

    def _masked(self, step: Step) -> Tensor:
        images = step.batch.image
        kept = self.mask.draw(tuple(images.shape[-2:]), step.seed, step.iteration, step.slots)
        return self.prompt(images, kept.to(images.device))

    def pictures(self, step: Step) -> dict[str, Tensor]:
        """Every sample masked, and restored from that."""
        masked, network = self._masked(step), step.network
        features = network.encode(network.whole_patches(masked, 0.0), plain=True)
        return {"masked": masked, "restored": self.decoder(features.maps, _restored_size(masked))}

    def prepare(self, step: Step) -> None:
        """Add the view of masked images, made of clean ones."""
        masked, names = self._masked(step), tuple(step.batch.names)
        # one pass with the segmentation's images, unless that one injects at blocks
        beside = None if self.separate else "image"
        step.views["masked"] = View(masked, names=names, beside=beside, plain=self.separate)
        if self.separate and len(rows := self._styled_rows(step)):
            styled = step.views["image"].images[rows]
            step.views["styled"] = View(styled, names=_at(names, rows), beside="masked", plain=True)

    def terms(self, step: Step) -> list[Term]:
        """What restoring costs each sample."""
        clean, names = step.batch.image, step.batch.names
        size = _restored_size(clean)
        counts = _resize(inside(clean).to(clean.dtype), size) >= 1  # a pixel between picture and filling is none
        of_masked = at_least_float32(self.decoder(step.features["masked"].maps, size))
        target = self._target(clean, step.views["masked"].images, size)
        terms = [Term("mim", self._distance(of_masked, target, counts), list(names))]
        if not len(rows := self._styled_rows(step)):
            return terms if step.clean else self._counted(terms)
        maps = step.features["styled"].maps if self.separate else [m[rows] for m in step.features["image"].maps]
        of_styled = at_least_float32(self.decoder(maps, size))
        target = self._target(clean[rows], step.views["image"].images[rows], size)
        share, samples = len(rows) / len(names), list(_at(names, rows))
        consistency = _mean((of_masked[rows] - of_styled).abs(), counts[rows])
        terms += [
            Term("mim_styled", self._distance(of_styled, target, counts[rows]), samples, share),
            Term("style_consistency", consistency, samples, share),
        ]
        return self._counted(terms)

    def _counted(self, terms: list[Term]) -> list[Term]:
        """The terms, taken into the means of the journal; on the device, which need not wait for it."""
        for term in terms:
            total, count = self._seen.get(term.name, (0.0, 0))
            self._seen[term.name] = (total + term.losses.detach().double().sum(), count + len(term.losses))
        return terms

    def journal(self) -> dict[str, float]:
        """Mean of each term over the samples since the last line."""
        means = {name: float(total) / count for name, (total, count) in self._seen.items()}
        self._seen = {}
        return means

    def state(self) -> dict[str, Any]:
        """The sums of the journal; every draw is a function of numbers."""
        return {"seen": {name: [float(total), count] for name, (total, count) in self._seen.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._seen = {name: (total, count) for name, (total, count) in state["seen"].items()}

    def _styled_rows(self, step: Step) -> Tensor:
        """Indices of the styled samples, on the device of the images."""
        if self.styling is None or step.clean:
            return torch.empty(0, dtype=torch.long)
        return self.styling.fires(step).nonzero()[:, 0].to(step.batch.image.device)

    def _target(self, clean: Tensor, given: Tensor, size: Sequence[int]) -> Tensor:
        return _resize(clean if self.target == "clean" else given.detach(), size)

    def _distance(self, restored: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        error = restored - target
        return _mean(error.abs() if self.loss == "l1" else error.square(), counts)


def _restored_size(images: Tensor) -> tuple[int, ...]:
    return tuple(min(side, LARGEST_PX) for side in images.shape[-2:])


def _at(names: Sequence[str], rows: Tensor) -> tuple[str, ...]:
    return tuple(names[row] for row in rows.tolist())


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over bands and counted pixels of each sample, [B]; 0 without any. values [B, C, H, W], counts [B, 1, H,
    W]."""
    total = values.where(counts, 0).flatten(1).sum(1)
    return total / (counts.flatten(1).sum(1) * values.shape[1]).clamp(min=1)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
