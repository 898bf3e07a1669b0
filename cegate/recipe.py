"""What a trained model needs to be run on an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cegate.config import IGNORE


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

    def to_mapping(self) -> dict[str, Any]:
        """Plain lists and numbers, for a file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Recipe:
        """Read what `to_mapping` wrote; other keys are passed over, keys of later versions get their defaults."""
        known = {field.name for field in fields(cls)} & mapping.keys()
        given = {key: mapping[key] for key in known}
        tuples = {key: tuple(given[key]) for key in ("classes", "palette", "bands", "mean", "std")}
        return cls(**{**given, **tuples})
