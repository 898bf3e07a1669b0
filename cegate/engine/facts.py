"""What a run is about, in a few lines at its top: data, classes, model, plan, time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from cegate.config import Config
from cegate.data.sets import SegmentationSet
from cegate.engine.results import domain_title
from cegate.engine.sets import Sets
from cegate.segmenter import Segmenter, starting_plan
from cegate.tasks.crossearth import check_style

TIMED_STEPS = 10
"""Iterations after which the time is told."""
_SHOWN = 12


def facts_of(config: Config, sets: Sets, segmenter: Segmenter) -> list[str]:
    """Some lines about a run that is going to be trained."""
    return [f"{what}: {text}" for what, text in _facts(config, sets, segmenter)]


def _facts(config: Config, sets: Sets, segmenter: Segmenter) -> Iterator[tuple[str, str]]:
    source, counts = sets.source, segmenter.toolbox.counts()
    yield "source", f"{len(source)} images{f'; {source.division}' if source.division else ''}"
    yield "bands", _bands(source)
    yield "classes", _classes(source)
    tested = ", ".join(f"{domain_title(data.name)} ({len(data)} images)" for data in sets.evaluated)
    yield "evaluated on", tested or "nothing"
    if sets.unlabelled is not None:
        adapt = config.adapt
        yield (
            "adapting to",
            f"{len(sets.unlabelled)} unlabelled images, {adapt.method} from iteration {adapt.warmup} on",
        )
    head = sum(p.numel() for p in segmenter.head.parameters())
    yield (
        "backbone",
        f"{config.model.backbone}, patch {segmenter.backbone.patch}, features of layers {segmenter.layers}; "
        f"{config.model.head} head with {head:,} weights",
    )
    gate = config.gate
    plans = {"fisher": f"the {gate.k} best of {len(counts)} sites, chosen anew every {gate.interval} iterations"}
    plan = plans.get(gate.method) or f"{len(starting_plan(config, segmenter.toolbox).active)} sites"
    yield "plan", f"{len(counts)} sites with {sum(counts.values()):,} weights; training {plan}"
    if segmenter.refiner is not None:
        weights, refiner = sum(p.numel() for p in segmenter.refiner.parameters()), config.refiner
        yield (
            "refiner",
            f"{refiner.method}, {refiner.tokens} tokens of rank {refiner.rank} a layer, {weights:,} weights",
        )
    yield from _crossearth(config, segmenter)
    yield from _rasters(config, segmenter)
    train, data = config.train, config.data
    yield (
        "schedule",
        f"{train.iterations} iterations of {data.batch_size} crops of {data.crop} px, rate {train.lr:g}; "
        f"evaluated every {train.eval_every}",
    )


def _crossearth(config: Config, segmenter: Segmenter) -> Iterator[tuple[str, str]]:
    style, mim = config.style, config.mim
    if (injector := segmenter.parts().get("injector")) is not None:
        count = sum(p.numel() for p in injector.parameters())
        yield "injector", f"{config.injector.method} at {config.injector.at}, {count:,} weights"
    if origin := check_style(config):
        share = f"{100 * style.ratio:g} % of blocks of {style.block} px"
        yield "styles", f"{origin}; in {100 * style.probability:g} % of the iterations, {share}"
    if mim.method != "none":
        yield "masked images", f"{100 * mim.ratio:g} % of blocks of {mim.block} px, {mim.decoder}, {mim.loss}"


def _rasters(config: Config, segmenter: Segmenter) -> Iterator[tuple[str, str]]:
    second, modal = segmenter.recipe.second, config.modal
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in segmenter.parts().items()}
    if second is not None:
        without, bands = " or ".join(second.dispensable) or "neither", ", ".join(map(str, second.bands))
        word = "bands" if len(second.bands) > 1 else "band"
        yield "second raster", f"{second.name}, {word} {bands}, scaled by {second.scale}; learns to miss {without}"
    if "modal" in counts:
        yield "modalities", f"{modal.method} with {counts['modal']:,} weights"
    if "fusion" in counts:
        yield "neck", f"{modal.fusion} with {counts['fusion']:,} weights"


def _bands(source: SegmentationSet) -> str:
    names = source.band_names or ("",) * len(source.bands)
    read = [
        f"{' '.join(filter(None, (str(band), name)))} {low:.4g}..{high:.4g}"
        for band, name, (low, high) in zip(source.bands, names, source.value_range, strict=True)
    ]
    more = f" and {len(read) - _SHOWN} more" if len(read) > _SHOWN else ""
    second = f"; {len(source.second_bands)} of a second raster" if source.second_bands else ""
    return f"{', '.join(read[:_SHOWN])}{more} become 0..1{second}"


def _classes(source: SegmentationSet) -> str:
    shown = [f"{name} {100 * source.shares[name]:.1f} %" if source.shares else name for name in source.classes]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{', '.join(shown[:_SHOWN])}{more}{' of a sample' if source.shares else ''}"


def expected_time(step_seconds: Sequence[float], left: int) -> str:
    """How long the iterations that are left take, by those that were made.

    Args:
        step_seconds: of each iteration so far; the first, which makes ready, does not count.
        left: iterations to come.
    """
    each = statistics.median(step_seconds[1:] or step_seconds)
    seconds = each * left
    about = (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
    return f"{each:.2f} s an iteration: about {about} for the {left} left, without scoring and evaluation"
