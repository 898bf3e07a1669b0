"""The data of a run: every set opened alike, so that what is evaluated is what `cegate predict` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cegate.config import SOURCE_DOMAIN, Config, DataConfig, SetConfig
from cegate.data.datasets import open_set
from cegate.data.scale import ValueRange, is_eight_bit
from cegate.data.sets import DEFAULT_BANDS, SegmentationSet
from cegate.errors import ConfigError

UNLABELLED_DOMAIN = "unlabelled"
_RASTERS = ("its images", "a second raster")


@dataclass(frozen=True)
class Sets:
    """The data of a run."""

    source: SegmentationSet
    validation: SegmentationSet | None
    targets: list[SegmentationSet]
    unlabelled: SegmentationSet | None = None
    """Images to adapt to, opened without labels."""

    @property
    def evaluated(self) -> list[SegmentationSet]:
        """Validation set (domain ``source``), then targets."""
        return [*([self.validation] if self.validation is not None else []), *self.targets]

    @property
    def by_name(self) -> dict[str, SegmentationSet]:
        """All of them, the source as ``train``."""
        sets = {"train": self.source, **{data.name: data for data in self.evaluated}}
        return sets if self.unlabelled is None else sets | {self.unlabelled.name: self.unlabelled}


def open_sets(config: Config) -> tuple[Config, Sets]:
    """Open every set and look at its files; classes and palette that only the source knows enter the configuration.

    Raises:
        ConfigError: the sets have other classes, or read another number of bands than the source.
        DataError: a set is empty, or a file in it is unfit.
    """
    data = config.data
    _refuse_other_bands(data)
    source = open_set(data.source, name=SOURCE_DOMAIN, classes=data.classes, seed=config.run.seed)
    classes = list(source.classes)
    data = _with_bands_of(data, source)
    validation, targets = open_evaluated(data, classes, source.value_range, seed=config.run.seed)
    unlabelled = None
    if config.adapt.method != "none":
        like = source.value_range
        unlabelled = open_set(data.unlabelled, name=UNLABELLED_DOMAIN, classes=classes, labelled=False, like=like)
    sets = Sets(source, validation, targets, unlabelled)
    for opened in (source, *sets.evaluated, unlabelled):
        if opened is not None:
            _refuse_other_rasters(opened, source)
            opened.check(training=opened is source)
    palette = data.palette or list(source.palette)
    return replace(config, data=replace(data, classes=classes, palette=palette)), sets


def open_evaluated(
    data: DataConfig, classes: Sequence[str], value_range: ValueRange, *, seed: int = 0
) -> tuple[SegmentationSet | None, list[SegmentationSet]]:
    """The validation set, if there is one, and the targets; one without a range of its own gets the model's.

    Raises:
        ConfigError, DataError: as `open_set` does.
    """
    held = {"seed": seed, "held_out": True}  # where the set is what val_fraction holds out of the source
    validation = data.validation and open_set(
        data.validation, name=SOURCE_DOMAIN, classes=classes, like=value_range, **held
    )
    targets = [open_set(cfg, name=name, classes=classes, like=value_range) for name, cfg in data.targets.items()]
    return validation, targets


def _with_bands_of(data: DataConfig, source: SegmentationSet) -> DataConfig:
    """The bands of second rasters that the files of the source decide hold for all sets, and for the model."""

    def settle(cfg: SetConfig | None) -> SetConfig | None:
        if cfg is None or cfg.second is None or cfg.second.bands is not None:
            return cfg
        surplus = cfg.second.surplus or "error"
        return replace(cfg, second=replace(cfg.second, bands=list(source.second_bands), surplus=surplus))

    if not source.second_bands:
        return data
    targets = {name: settle(cfg) for name, cfg in data.targets.items()}
    return replace(
        data,
        source=settle(data.source),
        targets=targets,
        validation=settle(data.validation),
        unlabelled=settle(data.unlabelled),
    )


def _refuse_other_rasters(opened: SegmentationSet, source: SegmentationSet) -> None:
    if opened.channels != source.channels:
        raise ConfigError(
            f"set {opened.name!r} gives {_spell(opened)}, the source {_spell(source)}; every set needs the same "
            "(second, with missing: allow where a set has no second raster and the model may do without)"
        )


def _spell(opened: SegmentationSet) -> str:
    return " and ".join(
        f"{count} band{'s' * (count != 1)} of {what}" for count, what in zip(opened.channels, _RASTERS, strict=False)
    )


def _refuse_other_bands(data: DataConfig) -> None:
    wanted = len(data.source.bands or DEFAULT_BANDS)
    sets = {"validation": data.validation, "unlabelled": data.unlabelled}
    sets |= {f"targets.{name}": target for name, target in data.targets.items()}
    counts = {f"data.{key}.bands": len(cfg.bands or DEFAULT_BANDS) for key, cfg in sets.items() if cfg is not None}
    if wrong := [f"{key} {count}" for key, count in counts.items() if count != wanted]:
        raise ConfigError(
            f"data.source.bands has {wanted} bands, but {', '.join(wrong)} (where none are given, the first three "
            f"count); every set needs {wanted}, in the same order"
        )


def value_range_of(source: SegmentationSet) -> list[list[float]] | None:
    """(low, high) per band; ``None`` where it is that of 8-bit images, so that others are refused at prediction."""
    return None if is_eight_bit(source.value_range) else [list(pair) for pair in source.value_range]
