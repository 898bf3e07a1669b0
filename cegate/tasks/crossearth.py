"""The tasks of CrossEarth, as a configuration asks for them (sections ``style`` and ``mim``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cegate.config import Config
from cegate.data.rasters import Window
from cegate.data.sets import SegmentationSet
from cegate.masks import BlockMask
from cegate.segmenter import Segmenter
from cegate.style.injection import EarthStyleInjection, to_rgb
from cegate.style.networks import ColourStatistics, load_style
from cegate.style.statistics import load_statistics, measure
from cegate.tasks.masked_images import MaskedImages
from cegate.tasks.styling import Styling
from cegate.tasks.task import Task

log = logging.getLogger(__name__)

MEASURED, MEASURED_SIDE_PX = 256, 1024
"""Images of the source, and of each the middle, whose styles are measured where no statistics are given."""


def crossearth_tasks(config: Config, network: Segmenter, source: SegmentationSet) -> list[Task]:
    """Styling, then masked images, where the configuration has them; they follow segmentation in the list of tasks.

    Args:
        config: the run.
        network: on its device.
        source: whose styles are measured where no statistics are given.

    Raises:
        CheckpointError: weights or statistics that do not fit.
        ConfigError: a block larger than the crop, or a number out of range; the key is named.
    """
    tasks: list[Task] = []
    styling = None
    if config.style.method == "earth":
        styling = build_styling(config, network, source)
        tasks.append(styling)
    if config.mim.method == "restore":
        mim, injector = config.mim, config.injector
        task = MaskedImages(
            BlockMask(mim.ratio, mim.block, config.data.crop),
            channels=network.backbone.width,
            bands=len(network.recipe.bands),
            crop=config.data.crop,
            seed=config.run.seed,
            decoder=mim.decoder,
            prompt=mim.prompt,
            loss=mim.loss,
            target=mim.target,
            styling=styling,
            separate=injector.method == "gse" and injector.at == "blocks",
        )
        tasks.append(task)
    return tasks


def check_style(config: Config) -> str:
    """Where styles come from, in words; '' where there are none. Reads all files that a run needs for them.

    Raises:
        CheckpointError: weights of another network, or statistics that do not fit them; file and keys are named.
    """
    given = config.style
    if given.method == "none":
        return ""
    style = load_style(given.weights) if given.weights else ColourStatistics()
    if given.statistics is None:
        return f"the source's own, by {style.about}"
    statistics = load_statistics(given.statistics)
    statistics.check(style)
    return f"{statistics.source}, by {style.about}"


def build_styling(config: Config, network: Segmenter, source: SegmentationSet) -> Styling:
    """Styling with the weights and statistics of a configuration."""
    given = config.style
    mask = BlockMask(given.ratio, given.block, config.data.crop, "style")
    style = load_style(given.weights).to(network.device)
    if given.statistics is None:
        log.warning(
            "style: no style.statistics, so styles are those of the source itself; cegate data style-stats FOLDER "
            "measures those of other places"
        )
        statistics = measure(style, _pictures(source), f"the source {source.name!r}")
    else:
        statistics = load_statistics(given.statistics)
    injection = EarthStyleInjection(
        style,
        statistics,
        mean=network.recipe.mean,
        std=network.recipe.std,
        alpha=given.alpha,
        covariance=given.covariance,
        region=given.region,
        renormalize=given.renormalize,
    )
    return Styling(injection.to(network.device), mask, probability=given.probability, draw=given.draw)


def _pictures(dataset: SegmentationSet) -> Iterator[Tensor]:
    """Images [3, H, W] in 0..1, evenly spread over a set."""
    count = min(MEASURED, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        part = dataset.read(index, Window.middle_of(dataset.size(index), MEASURED_SIDE_PX))
        yield to_rgb(torch.from_numpy(part.image)[None])[0][0]
