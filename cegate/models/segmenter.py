"""The segmenter: frozen ViT, toolbox, trained head. Images in, class logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cegate.config import IGNORE, Config
from cegate.data.scale import EIGHT_BIT, ValueRange
from cegate.errors import BackboneError, ConfigError, DataError
from cegate.gate import GatePlan, select_top_k
from cegate.losses import pixel_cross_entropy
from cegate.models.adapters import Adapter, AdapterBank, Chosen, Gates
from cegate.models.compute import precision_of
from cegate.models.head import Head
from cegate.models.heads import build_head
from cegate.models.vit import build_vit, extract_features, feature_layers
from cegate.palette import default_palette
from cegate.recipe import Recipe
from cegate.refiners.rein import Rein
from cegate.scenes.mosaic import Mosaic
from cegate.scenes.predictor import Predictor
from cegate.scenes.reader import RawImage, open_reader
from cegate.scenes.sink import ClassArray, ShareArray
from cegate.toolbox.toolbox import Toolbox


class Segmenter(nn.Module):
    """Frozen ViT with a toolbox, and a head on four of its layers.

    Args:
        vit: timm vision transformer; frozen here and always in evaluation mode.
        toolbox: its sites.
        head: maps four feature maps to logits.
        layers: 0-based layers whose tokens the head sees.
        classes: names in the order of their indices.
        config: what it was built from; windows, bands and normalisation are read from it.
        refiner: tokens that refine every block's output after the block's sites.
    """

    def __init__(
        self,
        vit: nn.Module,
        toolbox: Toolbox,
        head: nn.Module,
        layers: Sequence[int],
        classes: Sequence[str],
        config: Config,
        refiner: Rein | None = None,
    ) -> None:
        super().__init__()
        self.vit, self.toolbox, self.head, self.refiner = vit, toolbox, head, refiner
        self.bank = AdapterBank()
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
    def pixel_range(self) -> ValueRange:
        """(low, high) of each band that becomes 0..1."""
        return self.value_range or [EIGHT_BIT] * len(self.bands)

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

    def refine(self, on: bool) -> None:
        """Let the refiner take part, or leave it out; nothing happens without one."""
        if self.refiner is not None:
            self.refiner.attach() if on else self.refiner.unwrap()

    def learning_modules(self) -> list[nn.Module]:
        """What an optimiser is given: sites, head, the refiner if there is one, and the backbone if it is tuned."""
        refiner = [self.refiner] if self.refiner is not None else []
        backbone = [self.vit] if self.config.model.tune == "full" else []
        return [self.toolbox, self.head, *refiner, *backbone]

    def features(self, images: Tensor) -> list[Tensor]:
        """Four maps [B, C, H/patch, W/patch]; H and W must be multiples of the patch side."""
        return extract_features(self.vit, images, self.layers)

    def forward(self, images: Tensor, *, gates: Gates | None = None, adapter: Chosen | None = None) -> Tensor:
        """Logits of a batch, each sample as it would be alone.

        Args:
            images: [B, bands, H, W], normalised float32; any size (padded to whole patches).
            gates: sites that run in this call, [3, L] for all samples or [B, 3, L] for each (rows spatial, semantic,
                frequency; 0 or 1); default: those of the plan, or of each sample's adapter. What learns stays as the
                plan of the toolbox says.
            adapter: name or index of the adapter of all samples or of each, see :meth:`add_adapter`; default: the
                model's own weights and head.

        Returns:
            [B, K, H, W]; channel k of a sample is class k of its adapter.

        Raises:
            ConfigError, ValueError: an adapter is unknown, adapters differ in their number of classes, or gates do not
                fit.
        """
        height, width = images.shape[-2:]
        images = self._whole_patches(images, 0.0)
        size = images.shape[-2:]
        if gates is None and adapter is None:
            return self.head(self.features(images), size)[..., :height, :width]
        call = self.bank.call(self.toolbox, len(images), gates, adapter)
        with self.toolbox.dispatched(call.shares):
            features = self.features(call.sort(images))
        heads = [(part, self.head if index is None else self.bank.head(index)) for part, index in call.heads]
        logits = [head([f[part] for f in features], size)[..., :height, :width] for part, head in heads]
        return call.restore(logits)

    def loss(
        self, images: Tensor, labels: Tensor, *, weights: Tensor | None = None, gates: Gates | None = None
    ) -> Tensor:
        """Task loss of each sample alone, [B]; it does not depend on what else is in the batch.

        Args:
            images: [B, bands, H, W] normalised float32.
            labels: [B, H, W] int64, 255 ignored.
            weights: [B, H, W] how much each pixel counts; default: 1.
            gates: as in :meth:`forward`.
        """
        images, labels = self._whole_patches(images, 0.0), self._whole_patches(labels, self.ignore)
        weights = None if weights is None else self._whole_patches(weights, 0.0)
        if gates is None:
            return self.head.loss(self.features(images), labels, weights)
        call = self.bank.call(self.toolbox, len(images), gates, None)
        with self.toolbox.dispatched(call.shares):
            features = self.features(call.sort(images))
        sorted_weights = None if weights is None else call.sort(weights)
        return call.restore([self.head.loss(features, call.sort(labels), sorted_weights)])

    def nll(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean pixel cross entropy of each sample's semantic prediction, [B]."""
        return pixel_cross_entropy(self(images), labels)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Name -> adapter that this model holds beside its own weights, in the order of their indices."""
        return self.bank.adapters

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Hold one more adapter over this backbone; ``model(images, adapter=name)`` then runs it.

        Its weights are copied and frozen. Classes, head, bands and sites that are on may be its own.

        Args:
            name: new name.
            adapter: as :func:`cegate.read_adapter` gives it.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: another backbone or toolbox, weights that do not fit or are not finite; nothing is added.
        """
        self.bank.add(name, adapter, self)

    def delete_adapter(self, name: str) -> None:
        """Give up an adapter; the indices of later ones move down by one.

        Raises:
            ConfigError: there is no adapter of that name.
        """
        self.bank.delete(name)

    def _whole_patches(self, pixels: Tensor, fill: float) -> Tensor:
        height, width = pixels.shape[-2:]
        below, right = -height % self.patch, -width % self.patch
        return F.pad(pixels, (0, right, 0, below), value=fill) if below or right else pixels

    @property
    def recipe(self) -> Recipe:
        """What its own weights need to be run."""
        return self.recipe_of(None)

    def recipe_of(self, adapter: str | int | None) -> Recipe:
        """What an adapter needs to be run; None: the model's own weights.

        Raises:
            ConfigError: there is no such adapter.
        """
        learned = self if adapter is None else self.bank.named(adapter)
        data = learned.config.data
        return Recipe(
            classes=tuple(learned.classes),
            palette=tuple(data.palette or default_palette(len(learned.classes))),
            bands=tuple(learned.bands),
            mean=tuple(learned.mean),
            std=tuple(learned.std),
            value_range=learned.value_range,
            crop=data.crop,
            stride=data.stride,
            precision=self.config.run.precision,
        )

    def predictor(
        self, *, adapter: str | int | None = None, stride: int | None = None, blend: str = "cosine"
    ) -> Predictor:
        """What puts images through the model; arguments as of :meth:`predict`."""
        recipe, forward, head = self.recipe_of(adapter), self, self.head
        if adapter is not None:
            forward, head = partial(self, adapter=adapter), self.bank.head(self.bank.index(adapter))
        mosaic = Mosaic(recipe.crop, stride or recipe.stride, blend, log_shares=head.log_shares)
        return Predictor(forward, mosaic, self.device, precision_of(recipe.precision, self.device)[1], self)

    def predict(
        self,
        image: RawImage,
        *,
        adapter: str | int | None = None,
        all_pixels: bool = False,
        stride: int | None = None,
        blend: str = "cosine",
        progress: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        """Class index of every pixel.

        A file is read, seen and forgotten from top to bottom: beside the result, some windows' height of it is held.
        Several threads may call it at once.

        Args:
            image: (bands, H, W) or (H, W, bands) array, or an image file.
            adapter: which adapter sees it; default: the model's own weights.
            all_pixels: predict also where the image says that it has no data.
            stride: step between windows in pixels; default: that of the configuration.
            blend: how windows that overlap are weighed: ``cosine`` and ``linear`` less towards their edges, ``none``
                alike, as in evaluation.
            progress: told the share of the image, 0..1, that is done.

        Returns:
            (H, W) uint8; 255 where a band is NaN or infinite, or the image says that it has no data: a file by the
            nodata value in every band, its alpha band or its mask, a masked array where all bands are masked.

        Raises:
            ConfigError: there is no such adapter or blend, or the stride is larger than a window.
            DataError: the image cannot be read, or is not of the bands, depth or scale that were learned from.
        """
        predictor = self.predictor(adapter=adapter, stride=stride, blend=blend)
        with open_reader(image, self.recipe_of(adapter), all_pixels=all_pixels) as reader:
            sink = ClassArray(reader.size)
            predictor.run(reader, sink, progress)
        return sink.array

    def predict_proba(
        self,
        image: RawImage,
        *,
        adapter: str | int | None = None,
        all_pixels: bool = False,
        stride: int | None = None,
        blend: str = "cosine",
    ) -> np.ndarray:
        """Class probabilities, (K, H, W) float32, of a (bands, H, W) or (H, W, bands) array or an image file; NaN
        where :meth:`predict` gives 255. Else as there."""
        predictor, recipe = self.predictor(adapter=adapter, stride=stride, blend=blend), self.recipe_of(adapter)
        with open_reader(image, recipe, all_pixels=all_pixels) as reader:
            sink = ShareArray(len(recipe.classes), reader.size)
            predictor.run(reader, sink)
        return sink.array

    def normalise(self, image: RawImage, *, adapter: str | int | None = None) -> Tensor:
        """Raw pixels -> the normalised float32 tensor [bands, H, W] that the backbone takes.

        Args:
            image: (bands, H, W) or (H, W, bands) array, or an image file.
            adapter: whose bands and value range count; default: the model's own.

        Raises:
            ConfigError: there is no such adapter.
            DataError: wrong number of bands, NaN or infinite pixels, or a scale that is not that of training.
        """
        with open_reader(image, self.recipe_of(adapter), all_pixels=True) as reader:
            pixels, empty = reader.read(0, reader.size[0])
        if empty is not None and empty.any():
            raise DataError(
                f"{reader.name} has {int(empty.sum())} NaN or infinite pixels; fill them, or call predict, which "
                "leaves them out"
            )
        return pixels


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


def build_refiner(config: Config, vit: nn.Module, head: Head) -> Rein | None:
    """The refiner of a configuration, linked to the head's queries where it has some."""
    if config.refiner.method == "none":
        return None
    refiner = Rein(vit, config.refiner, query_width=head.query_width)
    if head.query_width is not None:
        head.take_queries(refiner)
    return refiner


def build(config: Config) -> Segmenter:
    """Build backbone, toolbox, head and refiner from a configuration; equal seeds give equal weights.

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
        linked = config.refiner.method == "rein" and model.head == "mask2former"
        queries = {"queries": config.refiner.tokens} if linked else {}  # one for each token
        head = build_head(model.head, channels=vit.embed_dim, classes=len(data.classes), **queries)
        toolbox = Toolbox(vit, config.toolbox)
        toolbox.apply(starting_plan(config, toolbox))
        refiner = build_refiner(config, vit, head)
    layers = feature_layers(len(vit.blocks), model.features)
    return Segmenter(vit, toolbox, head, layers, data.classes, config, refiner)
