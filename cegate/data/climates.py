"""The climates of the procedural scenes (climates.yaml): what a landscape is made of and how a sensor sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

CLASSES: tuple[str, ...] = ("background", "building", "forest", "road", "water")
"""Class names in the order of their indices."""
PALETTE: tuple[str, ...] = ("#E9DDB8", "#D1532A", "#1F7A5C", "#3B3B45", "#5AA9DD")
"""One colour per class: sand, brick, pine, asphalt, lake; told apart with any common colour vision."""
BACKGROUND, BUILDING, FOREST, ROAD, WATER = range(5)

Group = Literal["domain", "pretraining"]


@dataclass(frozen=True)
class Climate:
    """How a landscape looks and how a sensor sees it. Lengths are pixels at `scale` 1, colours "#RRGGBB"."""

    name: str
    group: Group
    """domain (a source or a target) or pretraining (seen without labels only)."""
    fields: tuple[str, ...]
    """Crops of the parcels."""
    wild: tuple[str, str]
    """Two tones of open land."""
    garden: str
    """Ground between houses."""
    woods: tuple[str, str]
    """Shaded and lit side of a crown."""
    water: tuple[str, str]
    """Middle and edge of a water body."""
    roads: tuple[str, str]
    """Street and main road."""
    roofs: tuple[str, ...]
    """Roof colours."""
    scale: float = 1.0
    """Size of every object."""
    town: float = 0.35
    """Share of blocks with houses."""
    forest: float = 0.25
    """Share of the open land that is wooded."""
    lake: float = 0.05
    """Share under lakes."""
    river: float = 0.6
    """Probability of a river."""
    open_land: float = 0.3
    """Share of the open land without parcels."""
    curvature: float = 0.5
    """How far streets bend, 0..1."""
    crown: float = 6.0
    """Spacing of tree crowns in pixels."""
    density: float = 1.0
    """Share of crowns that stand inside a wood, 0..1."""
    texture_px: float = 5.0
    """Wavelength of the ground's texture."""
    texture: float = 0.08
    """Its relative strength."""
    furrows: float = 0.05
    """Relative strength of plough lines."""
    pivots: float = 0.0
    """Share of field blocks that are irrigated circles."""
    sun: float = 135.0
    """Where shadows fall, degrees clockwise from right."""
    shadow: float = 0.9
    """Length of a shadow over the height of the object."""
    relief: float = 0.06
    """Relative strength of hill shading."""
    haze: float = 0.0
    """Share of light scattered in, 0..1."""
    haze_colour: str = "#C9D3DC"
    """Its colour."""
    gain: float = 1.0
    """Contrast about mid grey."""
    blur: float = 0.6
    """Standard deviation of the optics in pixels, not scaled."""
    noise: float = 0.012
    """Standard deviation of the sensor's noise, on 0..1."""


_COLOURS = ("fields", "wild", "garden", "woods", "water", "roads", "roofs", "haze_colour")


def _climate(name: str, row: dict[str, Any]) -> Climate:
    colours = {key: tuple(f"#{colour}" for colour in row[key].split()) for key in _COLOURS if key in row}
    single = {key: colours[key][0] for key in ("garden", "haze_colour") if key in colours}
    return Climate(name=name, **{**row, **colours, **single})


_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
CLIMATES: dict[str, Climate] = {name: _climate(name, row) for name, row in _TABLE.items()}
"""Every climate by name."""
PRETRAINING: tuple[str, ...] = tuple(name for name, climate in CLIMATES.items() if climate.group == "pretraining")
"""Climates that pretraining without labels may see; none of them is a source or a target."""
