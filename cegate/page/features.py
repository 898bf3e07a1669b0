"""What the backbone makes of pixels: the principal components of its last layer as colours, and a map of the features
of classes and domains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from cegate.checkpoint import load_checkpoint
from cegate.compute import pick_device, precision_of
from cegate.config import IGNORE, Config
from cegate.data.rasters import Window
from cegate.data.sets import Item
from cegate.data.transforms import normalise
from cegate.errors import CegateError
from cegate.figures import LINES, STYLE, domain_title, svg_uri
from cegate.page.reading import RunFiles
from cegate.page.tiles import Picture, open_domain, photo
from cegate.palette import palette_of
from cegate.segmenter import Segmenter

IMAGES, SHOWN = 12, 3
"""Of each domain: images whose features are taken, and those that are pictured."""
POINTS = 150
"""Patches of a class in a domain on the map."""
LEAST_POINTS = 10
NO_UMAP = "The map of classes and domains needs umap-learn: pip install 'cegate[pictures]'."


class Sample(NamedTuple):
    """The middle of an image, a crop at most."""

    domain: str
    item: Item
    tokens: np.ndarray
    """[h, w, C] float32 of the last layer."""
    labels: np.ndarray
    """[h, w] class of the pixel in the middle of each patch; 255: not labelled."""


def features_part(run: RunFiles, config: Config) -> dict[str, Any]:
    """Pictures of the features of a run's best model; what cannot be read is said in it, not raised.

    Args:
        run: the run.
        config: its configuration, perhaps with other data roots or another device.
    """
    samples, problems = [], []
    try:
        device = pick_device(config.run.device)
        segmenter = load_checkpoint(run.folder, "best", config, device)
        precision = precision_of(config.run.precision, device)[1]
    except CegateError as error:
        return {"tiles": [], "map": "", "problems": [f"No pictures of features: {error}"]}
    for domain in run.domains:
        try:
            dataset = open_domain(config, domain, run.classes, segmenter.pixel_range)
            count = min(IMAGES, len(dataset))
            for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
                item = dataset.read(index, Window.middle_of(dataset.size(index), config.data.crop))
                samples.append(_sample(segmenter, precision, domain_title(domain), item))
        except CegateError as error:
            problems.append(f"{domain_title(domain)}: {error}")
    if not samples:
        return {"tiles": [], "map": "", "problems": problems}
    colours = principal_colours([sample.tokens for sample in samples])
    shown: dict[str, list[tuple[Picture, Picture]]] = {}
    for sample, colour in zip(samples, colours, strict=True):
        if len(own := shown.setdefault(sample.domain, [])) < SHOWN:
            own.append(_pictures(sample, colour, segmenter.backbone.patch))
    chosen = choose_points(samples, len(run.classes))
    drawn = ""
    if sum(map(len, chosen.values())) >= LEAST_POINTS:
        place = place_on_plane(np.concatenate(list(chosen.values())))
        if place is None:
            problems.append(NO_UMAP)
        else:
            palette = run.config.data.palette or palette_of(run.classes)
            drawn = svg_uri(map_figure(place, chosen, run.classes, palette))
    return {"tiles": list(shown.items()), "map": drawn, "problems": problems}


@torch.no_grad()
def _sample(segmenter: Segmenter, precision: Callable[[], AbstractContextManager], domain: str, item: Item) -> Sample:
    image = torch.from_numpy(normalise(item.image[None], *segmenter.recipe.statistics)).to(segmenter.device)
    was_training = segmenter.training
    segmenter.eval()
    with precision():
        tokens = segmenter.encode(segmenter.whole_patches(image, 0.0)).maps[-1][0]  # of two rasters, the image's
    segmenter.train(was_training)
    label = segmenter.whole_patches(torch.from_numpy(item.label.astype(np.int64))[None], IGNORE)[0].numpy()
    patch = segmenter.backbone.patch
    return Sample(
        domain, item, tokens.float().permute(1, 2, 0).cpu().numpy(), label[patch // 2 :: patch, patch // 2 :: patch]
    )


def principal_colours(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first three principal components of all tokens [h, w, C] together as red, green, blue: [h, w, 3] in 0..1.

    A component points where its largest entry is positive; 0 and 1 are its 1st and 99th percentile.
    """
    flat = np.concatenate([t.reshape(-1, t.shape[-1]) for t in tokens]).astype(np.float64)
    mean = flat.mean(0)
    _, vectors = np.linalg.eigh(np.cov(flat - mean, rowvar=False))
    first = vectors[:, ::-1][:, :3]
    first = first * np.sign(first[np.abs(first).argmax(0), np.arange(first.shape[1])])
    low, high = np.percentile((flat - mean) @ first, (1, 99), axis=0)
    return [np.clip(((t - mean) @ first - low) / np.maximum(high - low, 1e-12), 0, 1) for t in tokens]


def _pictures(sample: Sample, colour: np.ndarray, patch: int) -> tuple[Picture, Picture]:
    enlarged = colour.repeat(patch, axis=0).repeat(patch, axis=1)
    height, width = sample.item.image.shape[-2:]
    name = sample.item.name
    return (
        Picture("image", photo(sample.item.image), f"Image of {name}"),
        Picture("features", photo(np.moveaxis(enlarged[:height, :width], -1, 0)), f"Features of {name}", True),
    )


def choose_points(samples: Sequence[Sample], classes: int) -> dict[tuple[str, int], np.ndarray]:
    """(domain, class) -> features [n, C] of at most `POINTS` of its patches, drawn without replacement."""
    rng, chosen = np.random.default_rng(0), {}
    for domain in dict.fromkeys(sample.domain for sample in samples):
        own = [sample for sample in samples if sample.domain == domain]
        tokens = np.concatenate([s.tokens.reshape(-1, s.tokens.shape[-1]) for s in own])
        labels = np.concatenate([s.labels.ravel() for s in own])
        for number in range(classes):
            of_class = np.flatnonzero(labels == number)
            if len(of_class):
                chosen[domain, number] = tokens[np.sort(rng.permutation(of_class)[:POINTS])]
    return chosen


def place_on_plane(features: np.ndarray) -> np.ndarray | None:
    """Features [n, C] on a plane [n, 2] by UMAP; None where umap-learn is not installed."""
    try:
        import umap
    except ImportError:
        return None
    return umap.UMAP(n_neighbors=min(15, len(features) - 1), random_state=0, n_jobs=1).fit_transform(features)


def map_figure(
    place: np.ndarray, chosen: dict[tuple[str, int], np.ndarray], classes: Sequence[str], palette: Sequence[str]
) -> Figure:
    """The same points twice, in the colours of their classes and of their domains."""
    keys = [key for key, points in chosen.items() for _ in points]
    domains = list(dict.fromkeys(domain for domain, _ in chosen))
    panels = {
        "classes": [(classes[k], palette[k], [key[1] == k for key in keys]) for k in range(len(classes))],
        "domains": [(d, LINES[i % len(LINES)], [key[0] == d for key in keys]) for i, d in enumerate(domains)],
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        for ax, (title, groups) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for name, colour, whose in groups:
                if any(whose):
                    dots = ax.scatter(*place[whose].T, s=5, color=colour, label=name, linewidths=0)
                    dots.set_rasterized(True)
            ax.set(xticks=[], yticks=[], title=title)
            ax.spines[:].set_visible(False)
            ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.02), ncols=3, fontsize=8, markerscale=2)
    return figure
