"""What a trained model needs to be run on an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from cegate.config import IGNORE, Colour, LowHigh, Positive, Precision, Scale, Side, Word
from cegate.errors import ConfigError, shown
from cegate.fields import Meets, Range, read_fields

Names = Annotated[
    tuple[str, ...],
    Meets(lambda names: 2 <= len(names) == len(set(names)) <= 255 and all(names), "2 to 255 different names"),
]
BandNumbers = Annotated[
    tuple[Annotated[int, Range(1, 65535)], ...], Meets(bool, "one or more band numbers counted from 1")
]
# of pixels on 0..1; no sensor and no file tells apart what differs by less than a millionth of its range
Mean = Annotated[float, Range(-10, 10)]
Deviation = Annotated[float, Range(1e-6, 10)]
Ends = Annotated[list[float], Meets(lambda ends: len(ends) == 2 and ends[0] <= ends[1], "[low, high] with low < high")]


@dataclass(frozen=True)
class SecondRecipe:
    """How a second raster becomes further channels, 0..1, NaN where it is unknown; as `cegate.config.SecondConfig`."""

    name: Word
    bands: BandNumbers
    scale: Scale = "tile"
    value_range: LowHigh | None = None
    align: bool = True
    dispensable: tuple[Literal["image", "second"], ...] = ()
    """Which of "image" and "second" the model learned to do without."""
    surplus: Literal["error", "ignore"] = "ignore"
    """What becomes of a file with further bands."""


@dataclass(frozen=True)
class Recipe:
    """How pixels become what the backbone takes, how windows go over an image, and what the classes are.

    The single source of these for adapter folders, prediction, reports and export.
    """

    classes: Names
    """Names in the order of their indices."""
    palette: tuple[Colour, ...]
    """'#RRGGBB' of each class."""
    bands: BandNumbers
    """1-based bands of a file, in the order the backbone takes them."""
    mean: tuple[Mean, ...]
    std: tuple[Deviation, ...]
    """Of each band, on 0..1: as the backbone was pretrained."""
    value_range: list[Ends] | None = None
    """(low, high) of each band, which become 0 and 1; low = high: the band was constant, and all of it is 0.
    None: 8-bit pixels, 0..255."""
    ignore: Annotated[int, Range(0, 255)] = IGNORE
    """Value of a pixel that has no class, in labels and in masks."""
    crop: Side = 512
    """Side of a window in pixels."""
    stride: Side | None = None
    """Step between windows in pixels, 1..crop; None: two thirds of the window."""
    precision: Precision = "auto"
    """fp32, bf16, fp16 or auto, as ``run.precision``."""
    pixel_size_m: Positive | None = None
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
        """Read what `to_mapping` wrote; other keys are passed over, keys of later versions get their defaults.

        Raises:
            ConfigError: keys are missing, or values are not of their kind or do not fit each other; each is named.
        """
        recipe = read_fields(cls, mapping)
        if problems := list(recipe._problems()):
            raise ConfigError("; ".join(problems))
        return recipe

    def _problems(self) -> Iterator[str]:
        """What is accepted by itself and does not fit the rest."""
        lengths = {"palette": (self.classes, "classes", "a colour")}
        lengths |= dict.fromkeys(("mean", "std"), (self.bands, "bands", "a number"))
        if self.value_range is not None:
            lengths["value_range"] = (self.bands, "bands", "[low, high]")
            if self.value_range and all(low == high for low, high in self.value_range):
                yield f"value_range={shown(self.value_range)} must be [low, high] with low < high for a band at least"
        for key, (wanted, of, one) in lengths.items():
            if len(given := getattr(self, key)) != len(wanted):
                yield f"{key} has {len(given)} entries for {len(wanted)} {of}; give {one} for each"
        if self.second is not None and self.second.scale == "fixed" and self.second.value_range is None:
            yield "second.value_range is missing, which second.scale=fixed needs"
        if self.stride is not None and self.stride > self.crop:
            yield f"stride={self.stride} leaves gaps between windows of crop={self.crop}; use at most the crop"
