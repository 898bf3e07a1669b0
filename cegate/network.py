"""A frozen backbone, the parts plugged into it, and a head: images in, logits or losses out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.backbone.backbone import Backbone, Features
from cegate.backbone.ports import Circuit, Plug
from cegate.config import IGNORE
from cegate.losses import pixel_cross_entropy
from cegate.parts.part import Part


class Network(nn.Module):
    """encode -> neck -> decode.

    Args:
        backbone: frozen here and always in evaluation mode.
        parts: ``toolbox`` and ``head``, then whatever else learns; the order is that of the optimiser.
        layers: 0-based layers whose tokens the head sees.
    """

    def __init__(self, backbone: Backbone, parts: Mapping[str, Part], layers: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.vit, self.layers = backbone, backbone.vit, list(layers)
        for name, part in parts.items():
            self.add_module(name, part)
        self._names = tuple(parts)
        self._wired: tuple[object, Circuit] = (None, Circuit())

    def parts(self) -> dict[str, Part]:
        """Name -> part, in the optimiser's order."""
        return {name: self._modules[name] for name in self._names}

    def adapts(self, on: bool) -> None:
        """Let the parts that change the backbone's features take part, or leave them out (the frozen stage); what runs
        of the toolbox its plan says."""
        for name, part in self.parts().items():
            part.active = on or not part.adapts or name == "toolbox"

    def train(self, mode: bool = True) -> Network:
        """Train mode for the parts; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def other_plugs(self) -> list[Plug]:
        """The plugs of every active part but the toolbox."""
        parts = [part for name, part in self.parts().items() if name != "toolbox" and part.active]
        return [plug for part in parts for plug in part.plugs()]

    def circuit(self) -> Circuit:
        """What a call runs with, if it says nothing else: the plan's sites and the active parts."""
        key = self.toolbox.state_of_plugs(), [part.active for part in self.parts().values()]
        wired = self._wired
        if wired[0] != key:
            self._wired = wired = (
                key,
                Circuit([*self.toolbox.plugs(), *self.other_plugs()]),
            )  # in one step, for threads
        return wired[1]

    def encode(self, images: Tensor, circuit: Circuit | None = None, *, plain: bool = False) -> Features:
        """Features of the backbone with what is plugged in; ``plain`` leaves out what a part plugs in for one call.

        Args:
            images: [B, bands, H, W], whole patches.
            circuit: what is plugged in, in place of plan and parts.
            plain: as the restoration of masked images sees the backbone.
        """
        circuit, samples = circuit or self.circuit(), len(images)
        grid = tuple(side // self.backbone.patch for side in images.shape[-2:])
        parts = [] if plain else [part for part in self.parts().values() if part.active]
        if own := [plug for part in parts for plug in part.plugs_of_call(images, grid)]:
            circuit = Circuit([*circuit.plugs, *own])
        for part in self.parts().values():
            images = part.enter(images)
        return self.backbone.run(images, self.layers, circuit, streams=len(images) // max(samples, 1) or 1)

    def neck(self, features: Features, images: Tensor) -> Features:
        """What the active parts make of the features before the head."""
        for part in self.parts().values():
            features = part.change(features, images) if part.active else features
        return features

    def decode(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Logits [B, K, H, W] of what the neck gave."""
        return self.head(features.maps, size, features.queries)

    def forward(self, images: Tensor, *, circuit: Circuit | None = None) -> Tensor:
        """Logits [B, K, H, W] of images [B, bands, H, W] of any size, each as it would be alone."""
        height, width = images.shape[-2:]
        images = self.whole_images(images)
        features = self.neck(self.encode(images, circuit), images)
        return self.decode(features, tuple(images.shape[-2:]))[..., :height, :width]

    def loss_of(self, features: Features, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Task loss of each sample alone, [B], of what the neck gave; labels and weights [B, H, W] of whole patches."""
        return self.head.loss(features.maps, labels, weights, features.queries)

    def loss(
        self, images: Tensor, labels: Tensor, *, weights: Tensor | None = None, circuit: Circuit | None = None
    ) -> Tensor:
        """Task loss of each sample alone, [B]; it does not depend on what else is in the batch.

        Args:
            images: [B, bands, H, W] normalised float32.
            labels: [B, H, W] int64, 255 ignored.
            weights: [B, H, W] how much each pixel counts; default: 1.
            circuit: what is plugged in, in place of plan and parts.
        """
        images, labels = self.whole_images(images), self.whole_patches(labels, IGNORE)
        weights = None if weights is None else self.whole_patches(weights, 0.0)
        return self.loss_of(self.neck(self.encode(images, circuit), images), labels, weights)

    def nll(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean pixel cross entropy of each sample's semantic prediction, [B]."""
        return pixel_cross_entropy(self(images), labels)

    def whole_images(self, images: Tensor) -> Tensor:
        """Images [B, bands, H, W] filled up to whole patches: with 0, the mean colour, and with NaN, which is unknown,
        in the channels of a second raster."""
        own = images.shape[1] - sum(part.further for part in self.parts().values())
        filled = [self.whole_patches(images[:, :own], 0.0), self.whole_patches(images[:, own:], float("nan"))]
        return torch.cat(filled, 1) if own < images.shape[1] else filled[0]

    def whole_patches(self, pixels: Tensor, fill: float) -> Tensor:
        """[..., H, W] filled up below and to the right to multiples of the patch side."""
        height, width = pixels.shape[-2:]
        below, right = -height % self.backbone.patch, -width % self.backbone.patch
        return F.pad(pixels, (0, right, 0, below), value=fill) if below or right else pixels
