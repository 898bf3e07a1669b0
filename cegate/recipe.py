"""What a trained model needs to be run on an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cegate.config import IGNORE


@dataclass(frozen=True)
class SecondRecipe:
    """How a second raster becomes further channels, 0..1, NaN where it is unknown; as `cegate.config.SecondConfig`."""

    name: str
    bands: tuple[int, ...]
    scale: str = "tile"
    value_range: Sequence[float] | None = None
    align: bool = True
    dispensable: tuple[str, ...] = ()
    """Which of "image" and "second" the model learned to do without."""


@dataclass(frozen=True)
class Recipe:
    """How pixels become what the backbone takes, how windows go over an image, and what the classes are.

    The single source of these for adapter folders, prediction, reports and export.
    """

    classes: tuple[str, ...]
    """Names in the order of their indices."""
    palette: tuple[str, ...]
    """'#RRGGBB' of each class."""
    bands: tuple[int, ...]
    """1-based bands of a file, in the order the backbone takes them."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each band, on 0..1: as the backbone was pretrained."""
    value_range: Sequence[Sequence[float]] | None = None
    """(low, high) of each band, which become 0 and 1; None: 8-bit pixels, 0..255."""
    ignore: int = IGNORE
    """Value of a pixel that has no class, in labels and in masks."""
    crop: int = 512
    """Side of a window in pixels."""
    stride: int | None = None
    """Step between windows in pixels, 1..crop; None: two thirds of the window."""
    precision: str = "auto"
    """fp32, bf16, fp16 or auto, as ``run.precision``."""
    pixel_size_m: float | None = None
    """Ground sample distance that was trained on, in metres; None: unknown or mixed."""
    second: SecondRecipe | None = None
    """The second raster, of a model of two."""

    @property
    def further(self) -> int:
        """Channels of the second raster, which come last."""
        return 0 if self.second is None else len(self.second.bands)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of every channel; a second raster is 0..1 as it is."""
        return (*self.mean, *(0.0,) * self.further), (*self.std, *(1.0,) * self.further)

    def to_mapping(self) -> dict[str, Any]:
        """Plain lists and numbers, for a file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Recipe:
        """Read what `to_mapping` wrote; other keys are passed over, keys of later versions get their defaults."""
        known = {field.name for field in fields(cls)} & mapping.keys()
        given = {key: mapping[key] for key in known}
        tuples = {key: tuple(given[key]) for key in ("classes", "palette", "bands", "mean", "std")}
        if given.get("second") is not None:
            second = {
                key: tuple(v) if key != "value_range" and isinstance(v, list) else v
                for key, v in given["second"].items()
            }
            given["second"] = SecondRecipe(**second)
        return cls(**{**given, **tuples})
