"""What users call: a network with its recipe, the adapters it holds beside its own, and masks of images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from cegate.adapters import Adapter, AdapterBank, Call, Chosen, Gates
from cegate.backbone.backbone import Backbone, Features
from cegate.backbone.ports import Circuit
from cegate.backbone.vit import build_vit, feature_layers
from cegate.compute import precision_of
from cegate.config import IGNORE, Config
from cegate.data.scale import EIGHT_BIT, ValueRange
from cegate.errors import BackboneError, ConfigError, DataError
from cegate.gate import GatePlan, select_top_k
from cegate.heads.build import build_head
from cegate.losses import pixel_loss_of
from cegate.necks.dfm import DFM, Neck, StreamSum
from cegate.network import Network
from cegate.palette import palette_of
from cegate.parts.injector import Injection
from cegate.parts.mm_adapter import MMAdapter
from cegate.parts.mm_lora import MMLoRA
from cegate.parts.part import Part
from cegate.parts.rein import Rein
from cegate.parts.streams import Streams
from cegate.parts.toolbox import Toolbox
from cegate.recipe import Recipe, SecondRecipe
from cegate.scenes.mosaic import Mosaic
from cegate.scenes.predictor import Predictor
from cegate.scenes.reader import WORTH_SAYING, RawImage, Reader, SecondAlone, open_reader
from cegate.scenes.sink import ClassArray, ShareArray

log = logging.getLogger(__name__)


class Segmenter(Network):
    """Frozen ViT with a toolbox, and a head on four of its layers.

    Args:
        backbone, parts, layers: as in :class:`~cegate.network.Network`.
        config: what it was built from.
    """

    def __init__(self, backbone: Backbone, parts: Mapping[str, Part], layers: Sequence[int], config: Config) -> None:
        super().__init__(backbone, parts, layers)
        self.config, self.bank = config, AdapterBank()
        self.recipe = starting_recipe(config, backbone.vit)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their indices."""
        return self.recipe.classes

    @property
    def refiner(self) -> Part | None:
        """Rein, if there is one."""
        return self.parts().get("refiner")

    @property
    def pixel_range(self) -> ValueRange:
        """(low, high) of each band that becomes 0..1."""
        return self.recipe.value_range or [EIGHT_BIT] * len(self.recipe.bands)

    @property
    def device(self) -> torch.device:
        """Where the backbone lies."""
        return next(self.vit.parameters()).device

    def tune(self, on: bool) -> None:
        """Let the backbone learn, or freeze it; it stays in evaluation mode either way."""
        self.vit.requires_grad_(on)

    def learning_modules(self) -> dict[str, nn.Module]:
        """Name -> what an optimiser is given and a checkpoint holds: the parts, and the backbone if it is tuned."""
        backbone = {"vit": self.vit} if self.config.model.tune == "full" else {}
        return {**self.parts(), **backbone}

    def forward(
        self,
        images: Tensor,
        *,
        gates: Gates | None = None,
        adapter: Chosen | None = None,
        circuit: Circuit | None = None,
    ) -> Tensor:
        """Logits of a batch, each sample as it would be alone.

        Args:
            images: [B, bands, H, W], normalised float32; any size (padded to whole patches).
            gates: sites that run in this call, [3, L] for all samples or [B, 3, L] for each (rows spatial, semantic,
                frequency, see `Toolbox.rows`; 0 or 1); default: those of the plan, or of each sample's adapter. What
                learns stays as the plan of the toolbox says.
            adapter: name or index of the adapter of all samples or of each, see :meth:`add_adapter`; default: the
                model's own weights and head.
            circuit: what is plugged in, in place of all these.

        Returns:
            [B, K, H, W]; channel k of a sample is class k of its adapter.

        Raises:
            ConfigError, ValueError: an adapter is unknown, adapters differ in their number of classes, or gates do not
                fit.
        """
        if gates is None and adapter is None:
            return super().forward(images, circuit=circuit)
        height, width = images.shape[-2:]
        images = self.whole_images(images)
        size = tuple(images.shape[-2:])
        call = self.bank.call(self.toolbox, len(images), gates, adapter)
        features = self._encode_call(call, images)
        heads = [(part, self.head if index is None else self.bank.head(index)) for part, index in call.heads]
        logits = [head([f[part] for f in features.maps], size, features.queries) for part, head in heads]
        return call.restore([part[..., :height, :width] for part in logits])

    def _encode_call(self, call: Call, images: Tensor) -> Features:
        """What the heads of a call see, samples in running order."""
        images = call.sort(images)
        circuit = Circuit([*self.toolbox.plugs(call.uses), *self.other_plugs()])
        return self.neck(self.encode(images, circuit), images)

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        gates: Gates | None = None,
        circuit: Circuit | None = None,
    ) -> Tensor:
        """Task loss of each sample alone, [B]; as :meth:`Network.loss`, ``gates`` as in :meth:`forward`."""
        if gates is None:
            return super().loss(images, labels, weights=weights, circuit=circuit)
        images, labels = self.whole_images(images), self.whole_patches(labels, IGNORE)
        call = self.bank.call(self.toolbox, len(images), gates, None)
        sorted_weights = None if weights is None else call.sort(self.whole_patches(weights, 0.0))
        return call.restore([self.loss_of(self._encode_call(call, images), call.sort(labels), sorted_weights)])

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

    def recipe_of(self, adapter: str | int | None) -> Recipe:
        """What an adapter needs to be run; None: the model's own weights.

        Raises:
            ConfigError: there is no such adapter.
        """
        if adapter is None:
            return self.recipe
        return replace(self.bank.named(adapter).recipe, precision=self.recipe.precision)

    def predictor(
        self,
        *,
        adapter: str | int | None = None,
        stride: int | None = None,
        blend: str = "cosine",
        tta: str = "none",
    ) -> Predictor:
        """What puts images through the model; arguments as of :meth:`predict`."""
        recipe, forward, head = self.recipe_of(adapter), self, self.head
        if adapter is not None:
            forward, head = partial(self, adapter=adapter), self.bank.head(self.bank.index(adapter))
        shares, further = head.log_shares, recipe.further
        mosaic = Mosaic(
            recipe.crop, recipe.stride if stride is None else stride, blend, log_shares=shares, further=further
        )
        return Predictor(forward, mosaic, self.device, precision_of(recipe.precision, self.device)[1], self, tta)

    def predict(
        self,
        image: RawImage | None = None,
        *,
        second: RawImage | None = None,
        adapter: str | int | None = None,
        all_pixels: bool = False,
        stride: int | None = None,
        blend: str = "cosine",
        tta: str = "none",
        progress: Callable[[float], None] | None = None,
    ) -> np.ndarray:
        """Class index of every pixel.

        A file is read, seen and forgotten from top to bottom: beside the result, some windows' height of it is held.
        Several threads may call it at once.

        Args:
            image: (bands, H, W) or (H, W, bands) array, or an image file.
            second: for a model of two rasters, the other one, likewise (one band: (H, W) too); a file may lie on
                another grid. Either may be left out where the model learned to do without it.
            adapter: which adapter sees it; default: the model's own weights.
            all_pixels: predict also where the image says that it has no data.
            stride: step between windows in pixels; default: that of the configuration.
            blend: how windows that overlap are weighed: ``cosine`` and ``linear`` less towards their edges, ``none``
                alike, as in evaluation.
            tta: ``flip`` averages the class shares of windows and their mirror images, for twice the time.
            progress: told the share of the image, 0..1, that is done.

        Returns:
            (H, W) uint8; 255 where a band is NaN or infinite, or the image says that it has no data: a file by the
            nodata value in every band, its alpha band or its mask, a masked array where all bands are masked.

        Raises:
            ConfigError: there is no such adapter or blend, or the stride is larger than a window.
            DataError: the image cannot be read, or is not of the bands, depth or scale that were learned from; a raster
                that the model needs is missing.
        """
        predictor = self.predictor(adapter=adapter, stride=stride, blend=blend, tta=tta)
        with open_reader(image, self.recipe_of(adapter), second=second, all_pixels=all_pixels) as reader:
            sink = ClassArray(reader.size)
            predictor.run(reader, sink, progress)
        _tell(reader, second)
        return sink.array

    def predict_proba(
        self,
        image: RawImage | None = None,
        *,
        second: RawImage | None = None,
        adapter: str | int | None = None,
        all_pixels: bool = False,
        stride: int | None = None,
        blend: str = "cosine",
        tta: str = "none",
    ) -> np.ndarray:
        """Class probabilities, (K, H, W) float32, of a (bands, H, W) or (H, W, bands) array or an image file; NaN
        where :meth:`predict` gives 255. Else as there."""
        predictor = self.predictor(adapter=adapter, stride=stride, blend=blend, tta=tta)
        recipe = self.recipe_of(adapter)
        with open_reader(image, recipe, second=second, all_pixels=all_pixels) as reader:
            sink = ShareArray(len(recipe.classes), reader.size)
            predictor.run(reader, sink)
        _tell(reader, second)
        return sink.array

    def normalise(
        self, image: RawImage | None = None, *, second: RawImage | None = None, adapter: str | int | None = None
    ) -> Tensor:
        """Raw pixels -> the normalised float32 tensor [bands, H, W] that the model takes.

        Args:
            image: (bands, H, W) or (H, W, bands) array, or an image file.
            second: as in :meth:`predict`; its channels come last, NaN where it is unknown.
            adapter: whose bands and value range count; default: the model's own.

        Raises:
            ConfigError: there is no such adapter.
            DataError: wrong number of bands, NaN or infinite pixels, or a scale that is not that of training.
        """
        with open_reader(image, self.recipe_of(adapter), second=second, all_pixels=True) as reader:
            pixels, empty = reader.read(0, reader.size[0])
        if empty is not None and empty.any():
            raise DataError(
                f"{reader.name} has {int(empty.sum())} NaN or infinite pixels; fill them, or call predict, which "
                "leaves them out"
            )
        return pixels


def _tell(reader: Reader | SecondAlone, second: RawImage | None) -> None:
    """What a look at the mask would not show."""
    if reader.unread:
        log.warning("%s has %s", reader.name, reader.unread)
    if second is not None and reader.lacking >= WORTH_SAYING:
        log.warning("%s: the second raster is unknown in %.1f %% of it", reader.name, 100 * reader.lacking)


def starting_recipe(config: Config, vit: nn.Module) -> Recipe:
    """What a configuration and a backbone's pretraining say of how images are run; the value range is not known yet."""
    data, bands = config.data, tuple(config.data.source.bands or (1, 2, 3))
    unit = ((0.0,) * len(bands), (1.0,) * len(bands))
    mean, std = unit if config.model.normalize == "unit" else normalisation(vit, len(bands))
    return Recipe(
        classes=tuple(data.classes),
        palette=tuple(data.palette or palette_of(data.classes)),
        bands=bands,
        mean=mean,
        std=std,
        crop=data.crop,
        stride=config.evaluate.stride or data.stride,
        precision=config.run.precision,
        second=second_recipe(config),
    )


def second_recipe(config: Config) -> SecondRecipe | None:
    """How the model's second raster is read, if it has one, and what it learns to do without."""
    second = config.data.source.second
    if second is None:
        return None
    lost = {"image": config.modal.dropout > 0, "second": config.modal.dropout > 0 or second.missing == "allow"}
    dispensable = tuple(name for name, learned in lost.items() if learned)
    bands = tuple(second.bands or (1,))
    surplus = second.surplus or "ignore"
    return SecondRecipe(second.name, bands, second.scale, second.value_range, second.align, dispensable, surplus)


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
    """Build backbone, parts and head from a configuration; equal seeds give equal weights.

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
            resample=model.resample,
            official_relpos=model.official_relpos,
        )
        backbone = Backbone(vit)
        if vit_size % backbone.patch:
            low = vit_size // backbone.patch * backbone.patch
            raise BackboneError(
                f"{'model.image_size' if model.image_size else 'data.crop'}={vit_size} is no multiple of the ViT patch "
                f"size {backbone.patch}; use {low} or {low + backbone.patch}"
            )
        torch.manual_seed(config.run.seed)  # so that the parts do not depend on how the backbone was made
        parts = build_parts(config, backbone)
    return Segmenter(backbone, parts, feature_layers(backbone.depth, model.features), config)


def build_parts(config: Config, backbone: Backbone) -> dict[str, Part]:
    """Name -> part, in the optimiser's order: toolbox and head, then what else the configuration asks for."""
    rein = config.refiner.method == "rein"
    linked = rein and config.model.head == "mask2former"
    streams = stream_names(config)
    neck = build_neck(config, backbone, len(streams))
    channels = backbone.width if neck is None else neck.width
    options = {"queries": config.refiner.tokens} if linked else {}  # one for each token
    if config.model.head == "unetformer":
        options["skips"] = config.modal.fusion == "dfm"
    loss = pixel_loss_of(config.train.loss.name, config.train.loss.class_weights)
    head = build_head(config.model.head, channels=channels, classes=len(config.data.classes), loss=loss, **options)
    toolbox = Toolbox(backbone, config.toolbox, streams[1:])
    toolbox.apply(starting_plan(config, toolbox))
    parts: dict[str, Part] = {"toolbox": toolbox, "head": head}
    if rein:
        parts["refiner"] = Rein(backbone, config.refiner, query_width=head.query_width)
        if linked:
            head.link_queries()
    if len(streams) > 1:
        bands = [len(config.data.source.bands or (1, 2, 3)), len(config.data.source.second.bands or (1,))]
        parts["streams"] = Streams(streams, bands, bands[0])
    if (modal := build_modal(config, backbone, len(streams))) is not None:
        parts["modal"] = modal
    if config.injector.method == "gse":
        parts["injector"] = build_injection(config, backbone)
    if neck is not None:
        parts["fusion"] = neck  # `Network.neck` is what all parts do between backbone and head
    return parts


def stream_names(config: Config) -> list[str]:
    """Names of the modalities: the image's own is empty, that of a second raster is the word in its sites."""
    second = config.data.source.second
    return [""] if second is None else ["", second.name]


def build_modal(config: Config, backbone: Backbone, streams: int) -> Part | None:
    """MFNet's modules in every block, where they are asked for."""
    modal = config.modal
    shared = {"streams": streams, "exchange": modal.exchange}
    if modal.method == "mmadapter":
        return MMAdapter.build(backbone, ratio=modal.ratio, **shared)
    return MMLoRA.build(backbone, rank=modal.rank, **shared) if modal.method == "mmlora" else None


def build_neck(config: Config, backbone: Backbone, streams: int) -> Neck | None:
    """What makes one pyramid, or one set of maps, of the modalities; None where the head takes the maps as they are.

    Raises:
        ConfigError: the head cannot follow; what can is named.
    """
    decodes, fusion = config.model.head == "unetformer", config.modal.fusion
    if decodes:
        shared = {"project": backbone.finish, "streams": streams}
        if fusion == "dfm":
            return DFM(backbone.width, official_norm=config.modal.official_norm, **shared)
        return StreamSum(backbone.width, **shared)
    if streams == 1:
        return None
    if fusion == "dfm":
        raise ConfigError(
            f"model.head={config.model.head} takes four maps of one size, which modal.fusion=dfm does not make; set "
            "modal.fusion=sum, or model.head=unetformer"
        )
    return StreamSum(backbone.width, streams=streams, last=False)


def build_injection(config: Config, backbone: Backbone) -> Injection:
    """Injectors on the maps that the head sees, or at their blocks."""
    given, layers = config.injector, feature_layers(backbone.depth, config.model.features)
    return Injection(
        len(config.data.source.bands or (1, 2, 3)),
        backbone.width,
        layers,
        at=given.at,
        width=given.width,
        heads=given.heads,
        residual=given.residual,
        chain=given.chain,
        test=given.test,
    )
