"""The best and worst tiles of every domain, with pictures that are made anew by the run's best checkpoint."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image

from cegate.checkpoint import load_checkpoint
from cegate.compute import Precision, pick_device, precision_of
from cegate.config import IGNORE, SOURCE_DOMAIN, Config
from cegate.configfile import domain_title
from cegate.data.datasets import open_set
from cegate.data.sets import Item, SegmentationSet
from cegate.data.transforms import normalise
from cegate.engine.evaluator import percent, predict_logits, windows_of
from cegate.errors import CegateError, DataError
from cegate.figures import headline
from cegate.metrics import Confusion
from cegate.page.reading import RunFiles, how_to_evaluate, read_domain
from cegate.palette import palette_of
from cegate.segmenter import Segmenter, ValueRange

SIDE_PX = 512
"""Longest side of a picture."""
CONFIDENCE_STEPS, LEGEND_STEPS = 32, 6
CONFIDENCE_COLOURS = "bone"
OTHER_COUNTS = 0.01
"""Share of the pixels that may be counted otherwise than by the evaluation (another device or precision)."""


class Picture(NamedTuple):
    """One panel of a tile."""

    title: str
    source: str
    """data: URI."""
    alt: str
    flat: bool = False
    """Areas of one colour; never to be smoothed."""


@dataclass(frozen=True)
class Tile:
    """One image of a domain."""

    name: str
    place: str
    """Such as "worst 1"."""
    score: str
    mistake: str
    """The most frequent one."""
    pictures: Sequence[Picture] = ()
    note: str = ""
    has_ignored: bool = False
    """Some pixels of the truth are not labelled."""


@dataclass(frozen=True)
class DomainTiles:
    """Tiles of one domain."""

    domain: str
    tiles: Sequence[Tile] = ()
    problem: str = ""
    """Why there are no tiles, or no pictures."""

    @property
    def first(self) -> list[Tile]:
        """The worst and the best tile, for the top of the page."""
        return [tile for tile in self.tiles if tile.place.endswith(" 1") and tile.pictures]

    @property
    def others(self) -> list[Tile]:
        """The other tiles."""
        return [tile for tile in self.tiles if tile not in self.first]


def tiles_part(run: RunFiles, config: Config, count: int) -> dict[str, Any] | None:
    """Choose tiles by their score in eval/<domain>/tiles.npz, and picture them.

    Args:
        run: the run.
        config: its configuration, perhaps with other data roots or another device.
        count: best and worst tiles of a domain, each; 0 for none.

    Returns:
        Tiles of every domain, and the keys to those colours that are shown; ``None`` where nothing is wanted or
        measured. What cannot be read is said in it, not raised.
    """
    if not count or not run.domains:
        return None
    open_model = cache(lambda: _Painter(run, config))
    domains = [_domain_tiles(run, config, domain, count, open_model) for domain in run.domains]
    pictured = [tile for domain in domains for tile in domain.tiles if tile.pictures]
    palette = run.config.data.palette or palette_of(run.classes)
    colours = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in _confidence_palette(LEGEND_STEPS)]
    return {
        "domains": domains,
        "classes": list(zip(run.classes, palette, strict=True)) if pictured else [],
        "has_ignored": any(tile.has_ignored for tile in pictured),
        "confidence": colours if pictured else [],
        "least": f"{1 / max(len(run.classes), 1):.2f}",
    }


def _domain_tiles(
    run: RunFiles, config: Config, domain: str, count: int, open_model: Callable[[], _Painter]
) -> DomainTiles:
    title = domain_title(domain)
    try:
        files = read_domain(run, domain)
    except CegateError as error:
        return DomainTiles(title, (), str(error))
    if files.tile_names is None:
        return DomainTiles(title, (), f"There is no {files.folder / 'tiles.npz'}; {how_to_evaluate(run)}")
    tiles, problem = [], ""
    try:
        paint = open_model()
        open_tile = _opener(config, domain, run.classes, paint.segmenter.pixel_range)
    except CegateError as error:
        problem = f"No pictures: {error}"
    of = run.config.evaluate.mean_classes
    scored = [headline(Confusion(run.classes, counts).scores(of).to_dict()) for counts in files.tile_confusion]
    for place, index in choose_tiles([score for _, score in scored], count):
        name, counts, (what, score) = files.tile_names[index], files.tile_confusion[index], scored[index]
        pictures, note, has_ignored = (), "", False
        if not problem:
            try:
                item = open_tile(name)
                pictures, note = paint(item, counts)
                has_ignored = bool((item.label == IGNORE).any())
            except CegateError as error:
                note = f"No pictures: {error}"
        told = f"{what} {percent(score)} %", worst_mistake(counts, run.classes)
        tiles.append(Tile(name, place, *told, pictures, note, has_ignored))
    return DomainTiles(title, tiles, problem)


def choose_tiles(scores: Sequence[float | None], count: int) -> Iterator[tuple[str, int]]:
    """Pick the worst and the best tiles, none of them twice.

    Args:
        scores: of each tile; ``None`` for one without labelled pixels, which is never picked.
        count: of each, or half of the tiles where there are fewer than twice as many.

    Yields:
        (place such as "worst 1", index of the tile); the worst first, then the best; ties by index.
    """
    order = sorted((score, index) for index, score in enumerate(scores) if score is not None)
    worst = order[: min(count, len(order) // 2)]
    best = order[len(worst) :][::-1][:count]
    for name, group in (("worst", worst), ("best", best)):
        for number, (_, index) in enumerate(group, 1):
            yield f"{name} {number}", index


def worst_mistake(counts: np.ndarray, classes: Sequence[str]) -> str:
    """The most frequent wrong pair of classes of a tile, in words."""
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return "no pixel is wrong"
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    share = 100 * wrong[true, predicted] / counts.sum()
    return f"{share:.1f} % of pixels are {classes[true]} taken for {classes[predicted]}"


def open_domain(config: Config, domain: str, classes: Sequence[str], like: ValueRange) -> SegmentationSet:
    """The set of a domain, in the range of pixels that the model knows.

    Raises:
        DataError: the configuration has none, or it cannot be read.
    """
    source = config.data.validation if domain == SOURCE_DOMAIN else config.data.targets.get(domain)
    if source is None:
        raise DataError(f"the configuration has no set for the domain {domain}; give --data.targets.{domain}.root DIR")
    return open_set(
        source, name=domain, classes=classes, like=like, seed=config.run.seed, held_out=domain == SOURCE_DOMAIN
    )


def _opener(config: Config, domain: str, classes: Sequence[str], like: ValueRange) -> Callable[[str], Item]:
    """A function that reads a tile of a domain by its name."""
    dataset = open_domain(config, domain, classes, like)
    root = (config.data.validation if domain == SOURCE_DOMAIN else config.data.targets[domain]).root
    indices = {dataset.item_name(index): index for index in range(len(dataset))}

    def read(name: str) -> Item:
        if name not in indices:
            where = root or f"the set {domain!r}"
            raise DataError(f"{where} has no tile {name}; give the data that was evaluated")
        return dataset.read(indices[name])

    return read


class _Painter:
    """The run's best model, and the pictures it makes of a tile."""

    def __init__(self, run: RunFiles, config: Config) -> None:
        device = pick_device(config.run.device)
        self.segmenter: Segmenter = load_checkpoint(run.folder, "best", config, device)
        self.precision: Precision = precision_of(config.run.precision, device)[1]

    @torch.no_grad()
    def __call__(self, item: Item, counts: np.ndarray) -> tuple[Sequence[Picture], str]:
        """Pictures, and a note where the recomputed counts are not those of the evaluation."""
        segmenter = self.segmenter
        image = torch.from_numpy(normalise(item.image[None], *segmenter.recipe.statistics))
        windows = {**windows_of(segmenter.config), "fit": item.fit}
        logits = predict_logits(segmenter, image, precision=self.precision, **windows)
        sure, mask = (part[0].cpu().numpy() for part in logits.float().softmax(1).max(1))
        recount = Confusion(segmenter.classes)
        recount.update(mask, item.label.copy())  # the set holds it read-only
        moved = np.abs(recount.matrix.numpy() - counts).sum() / (2 * max(counts.sum(), 1))
        note = (
            f"Recomputed here, {100 * moved:.0f} % of the pixels are counted otherwise than by the evaluation: "
            "other data, another checkpoint or another precision."
            if moved > OTHER_COUNTS
            else ""
        )
        palette, k = segmenter.recipe.palette, len(segmenter.classes)
        own = len(item.image) - item.second
        beside = [] if not item.second else [second_picture(item, segmenter.recipe.second.name)]
        pictures = (
            Picture("image", photo(item.image[:own]), f"Image of {item.name}"),
            *beside,
            Picture("truth", class_map(item.label, palette), f"True classes of {item.name}", True),
            Picture("prediction", class_map(mask, palette), f"Predicted classes of {item.name}", True),
            Picture("confidence", confidence_map(sure, k), f"Confidence of the prediction of {item.name}"),
        )
        return pictures, note


# --- arrays as data: URIs -------------------------------------------------------------------------------------------


def photo(image: np.ndarray) -> str:
    """JPEG of an image [C, H, W] in 0..1: its first three bands, or the first in grey of one or two."""
    bands = image[:3] if len(image) >= 3 else image[:1]
    pixels = np.moveaxis((np.clip(np.nan_to_num(bands), 0, 1) * 255 + 0.5).astype(np.uint8), 0, -1)
    picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    picture.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return _uri(picture, "jpeg", quality=88)


def second_picture(item: Item, name: str) -> Picture:
    """The first band of a tile's second raster, in grey; what is unknown is transparent."""
    band = _thinned(item.image[len(item.image) - item.second])
    grey = np.clip(np.nan_to_num(band), 0, 1) * 255 + 0.5
    picture = Image.fromarray(np.stack([grey, np.where(np.isnan(band), 0, 255)], -1).astype(np.uint8), "LA")
    return Picture(name, _uri(picture, "png", optimize=True), f"{name} of {item.name}")


def class_map(mask: np.ndarray, palette: Sequence[str]) -> str:
    """PNG of class indices [H, W] uint8 in their colours; pixels that are not labelled are transparent."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in palette]
    picture = Image.fromarray(_thinned(mask).astype(np.uint8))
    picture.putpalette(colours.tobytes())
    return _uri(picture, "png", transparency=IGNORE, optimize=True)


def confidence_map(sure: np.ndarray, classes: int) -> str:
    """PNG of the share of the predicted class [H, W], coloured from 1 / classes to 1."""
    least = 1 / classes
    steps = np.clip((_thinned(sure) - least) / (1 - least), 0, 1) * (CONFIDENCE_STEPS - 1)
    picture = Image.fromarray((steps + 0.5).astype(np.uint8))
    picture.putpalette(np.array(_confidence_palette(CONFIDENCE_STEPS), np.uint8).tobytes())
    return _uri(picture, "png", optimize=True)


def _confidence_palette(steps: int) -> list[tuple[int, int, int]]:
    colours = matplotlib.colormaps[CONFIDENCE_COLOURS](np.linspace(0, 1, steps), bytes=True)
    return [(int(r), int(g), int(b)) for r, g, b, _ in colours]


def _thinned(array: np.ndarray) -> np.ndarray:
    """Every n-th pixel, so that the longest side fits."""
    step = -(-max(array.shape) // SIDE_PX)
    return array[::step, ::step]


def _uri(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
