"""The segmenter: frozen ViT, toolbox, trained head. Images in, class logits out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.config import IGNORE, Config
from cegate.data.rasters import read_image
from cegate.errors import BackboneError, ConfigError, DataError
from cegate.gate import GatePlan, select_top_k
from cegate.losses import pixel_cross_entropy
from cegate.models.heads import build_head
from cegate.models.sliding import slide
from cegate.models.vit import build_vit, extract_features, feature_layers
from cegate.palette import default_palette
from cegate.toolbox.toolbox import Toolbox

ValueRange = Sequence[Sequence[float]]  # [low, high] per band


class Segmenter(nn.Module):
    """Frozen ViT with a toolbox, and a head on four of its layers.

    Args:
        vit: timm vision transformer; frozen here and always in evaluation mode.
        toolbox: its sites.
        head: maps four feature maps to logits.
        layers: 0-based layers whose tokens the head sees.
        classes: names in the order of their indices.
        config: what it was built from; windows, bands and normalisation are read from it.
    """

    def __init__(
        self,
        vit: nn.Module,
        toolbox: Toolbox,
        head: nn.Module,
        layers: Sequence[int],
        classes: Sequence[str],
        config: Config,
    ) -> None:
        super().__init__()
        self.vit, self.toolbox, self.head = vit, toolbox, head
        self.layers, self.classes, self.config = list(layers), tuple(classes), config
        self.palette = tuple(config.data.palette or default_palette(len(classes)))
        self.bands = tuple(config.data.source.bands or (1, 2, 3))
        self.mean, self.std = normalisation(vit, len(self.bands))
        self.ignore = IGNORE
        self.value_range: ValueRange | None = None  # None: 8-bit images only, 0..255

    @property
    def patch(self) -> int:
        """Patch side in pixels."""
        return self.vit.patch_embed.patch_size[0]

    @property
    def device(self) -> torch.device:
        """Where the backbone lies."""
        return next(self.vit.parameters()).device

    def train(self, mode: bool = True) -> Segmenter:
        """Train mode for toolbox and head; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def tune(self, on: bool) -> None:
        """Let the backbone learn, or freeze it; it stays in evaluation mode either way."""
        self.vit.requires_grad_(on)

    def learning_modules(self) -> list[nn.Module]:
        """What an optimiser is given: sites, head, and the backbone if it is tuned."""
        backbone = [self.vit] if self.config.model.tune == "full" else []
        return [self.toolbox, self.head, *backbone]

    def features(self, images: Tensor) -> list[Tensor]:
        """Four maps [B, C, H/patch, W/patch]; H and W must be multiples of the patch side."""
        return extract_features(self.vit, images, self.layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K, H, W] of normalised float32 images [B, bands, H, W]; any size (padded to whole patches)."""
        height, width = images.shape[-2:]
        images = self._whole_patches(images, 0.0)
        return self.head(self.features(images), images.shape[-2:])[..., :height, :width]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Task loss of each sample alone, [B]; it does not depend on what else is in the batch.

        Args:
            images: [B, bands, H, W] normalised float32.
            labels: [B, H, W] int64, 255 ignored.
        """
        features = self.features(self._whole_patches(images, 0.0))
        return self.head.loss(features, self._whole_patches(labels, self.ignore))

    def nll(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean pixel cross entropy of each sample's semantic prediction, [B]."""
        return pixel_cross_entropy(self(images), labels)

    def _whole_patches(self, pixels: Tensor, fill: float) -> Tensor:
        height, width = pixels.shape[-2:]
        below, right = -height % self.patch, -width % self.patch
        return F.pad(pixels, (0, right, 0, below), value=fill) if below or right else pixels

    @torch.no_grad()
    def predict(self, image: np.ndarray | str | Path) -> np.ndarray:
        """Class index of every pixel, (H, W) uint8, of a (bands, H, W) or (H, W, bands) array or an image file."""
        return self._logits(image).argmax(0).to(torch.uint8).cpu().numpy()

    @torch.no_grad()
    def predict_proba(self, image: np.ndarray | str | Path) -> np.ndarray:
        """Class probabilities, (K, H, W) float32, of a (bands, H, W) or (H, W, bands) array or an image file."""
        return self._logits(image).float().softmax(0).cpu().numpy()

    def _logits(self, image: np.ndarray | str | Path) -> Tensor:
        pixels = self.normalise(image)
        was_training = self.training
        self.eval()
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                data = self.config.data
                return slide(self, pixels.to(self.device)[None], crop=data.crop, stride=data.stride)[0]
        finally:
            self.train(was_training)

    def normalise(self, image: np.ndarray | str | Path) -> Tensor:
        """Raw pixels -> the normalised float32 tensor [bands, H, W] that the backbone takes.

        Raises:
            DataError: wrong number of bands, NaN pixels, or a depth whose value range is unknown.
        """
        name = str(image) if isinstance(image, str | Path) else "image"
        pixels = read_image(image, self.bands) if isinstance(image, str | Path) else self._bands_first(image)
        if np.isnan(pixels).any():
            raise DataError(f"{name} has {int(np.isnan(pixels).any(0).sum())} NaN pixels; fill them before prediction")
        if self.value_range is None and pixels.dtype != np.uint8:
            raise DataError(f"{name} is {pixels.dtype}, the model was trained on 8-bit images; convert it to uint8")
        low, high = np.asarray(self.value_range or [[0, 255]] * len(self.bands), np.float32).T[:, :, None, None]
        unit = np.clip((pixels.astype(np.float32) - low) / (high - low), 0, 1)
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return torch.from_numpy((unit - mean) / std)

    def _bands_first(self, image: np.ndarray) -> np.ndarray:
        bands = len(self.bands)
        if image.ndim == 3 and image.shape[0] == bands:
            return image
        if image.ndim == 3 and image.shape[-1] == bands:
            return np.moveaxis(image, -1, 0)
        raise DataError(f"image has shape {image.shape}; the model takes ({bands}, H, W) or (H, W, {bands})")


def normalisation(vit: nn.Module, bands: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per band of pixels in 0..1, as the backbone was pretrained; further bands get the average."""
    known = getattr(vit, "pretrained_cfg", None) or {}
    mean, std = tuple(known.get("mean", (0.5,) * 3)), tuple(known.get("std", (0.5,) * 3))
    extend = lambda values: (values + (sum(values) / len(values),) * bands)[:bands]  # noqa: E731
    return extend(mean), extend(std)


def starting_plan(config: Config, toolbox: Toolbox) -> GatePlan:
    """The plan before the first choice; for ``fisher`` and ``random`` it is empty.

    Raises:
        ConfigError: k or a named site does not fit the toolbox.
    """
    gate = config.gate
    if gate.method in ("fisher", "random"):
        select_top_k(dict.fromkeys(toolbox.sites, 0.0), gate.k)  # k is checked at the door
        return GatePlan()
    if gate.method == "fixed" and not gate.sites:
        raise ConfigError("gate.method=fixed needs gate.sites, e.g. [spatial.7, semantic.0]")
    chosen = {"all": toolbox.sites, "none": [], "fixed": gate.sites}[gate.method]
    return GatePlan(chosen)


def build(config: Config) -> Segmenter:
    """Build backbone, toolbox and head from a configuration; equal seeds give equal weights.

    Raises:
        BackboneError, ConfigError: what does not fit is named.
    """
    model, data = config.model, config.data
    if len(data.classes) < 2:
        raise ConfigError(
            f"data.classes={list(data.classes)} must name at least two classes, in the order of their indices"
        )
    if data.palette and len(data.palette) != len(data.classes):
        raise ConfigError(
            f"data.palette has {len(data.palette)} colours for {len(data.classes)} classes; give one per class"
        )
    vit_size = model.image_size or data.crop
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        vit = build_vit(
            model.backbone,
            weights=model.weights,
            image_size=vit_size,
            patch_size=model.patch_size,
            in_chans=len(data.source.bands or (1, 2, 3)),
        )
        patch = vit.patch_embed.patch_size[0]
        if vit_size % patch:
            low = vit_size // patch * patch
            raise BackboneError(
                f"image size {vit_size} is not a multiple of the ViT patch size {patch}; use {low} or {low + patch}"
            )
        torch.manual_seed(config.run.seed)  # so that head and toolbox do not depend on how the backbone was made
        head = build_head(model.head, channels=vit.embed_dim, classes=len(data.classes))
        toolbox = Toolbox(vit, config.toolbox)
        toolbox.apply(starting_plan(config, toolbox))
    layers = feature_layers(len(vit.blocks), model.features)
    return Segmenter(vit, toolbox, head, layers, data.classes, config)
