"""The climates of the procedural scenes: what a landscape is made of and how a sensor sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


_LIST = (
    Climate(
        name="temperate",
        group="domain",
        fields=("#7E9A4C", "#93A65A", "#B5AD6C", "#6C8A45", "#A08E62", "#C2B878"),
        wild=("#76914F", "#8F9C61"),
        garden="#8C9A6B",
        woods=("#23402A", "#4E7241"),
        water=("#35566B", "#4F7484"),
        roads=("#8D8C8A", "#77777A"),
        town=0.42,
        lake=0.08,
        roofs=("#A3503C", "#8C4A3A", "#7A6A62", "#5E5A5C", "#B8694C", "#9A9088"),
    ),
    Climate(
        name="arid",
        group="domain",
        fields=("#C9A877", "#D3B688", "#B99A6C", "#8F9A5E", "#CFAE80"),
        wild=("#CBA777", "#DDBE92"),
        garden="#CDB28A",
        woods=("#56603B", "#8A8C5C"),
        water=("#2E7C86", "#6BA79E"),
        roads=("#A3978A", "#857D76"),
        roofs=("#E6DCC8", "#D8C6A6", "#C9B08A", "#F0EBDF", "#BFA27D", "#A98F74"),
        scale=0.8,
        town=0.45,
        forest=0.24,
        lake=0.07,
        river=0.45,
        open_land=0.7,
        curvature=0.25,
        crown=4.5,
        density=0.8,
        texture_px=12.0,
        texture=0.07,
        furrows=0.02,
        pivots=0.25,
        sun=45.0,
        shadow=1.3,
        relief=0.1,
        haze=0.1,
        haze_colour="#E3D3B8",
        blur=0.5,
        noise=0.018,
    ),
    Climate(
        name="tropical",
        group="domain",
        fields=("#4F8A3C", "#66A04A", "#7FAE4E", "#8C6A45", "#3F7A44", "#A3B85C"),
        wild=("#4C8440", "#6B9A4C"),
        garden="#8B7B58",
        woods=("#12351F", "#3C7A38"),
        water=("#5F6B58", "#7F8263"),
        roads=("#A87B5C", "#8B8078"),
        roofs=("#8FA3B0", "#B9C2C6", "#9C6B4E", "#5E86A8", "#7E8488", "#C7B9A3"),
        scale=1.25,
        town=0.42,
        forest=0.38,
        lake=0.04,
        river=0.75,
        open_land=0.45,
        curvature=0.9,
        crown=9.0,
        texture_px=3.5,
        texture=0.12,
        sun=250.0,
        shadow=0.5,
        haze=0.16,
        haze_colour="#C4D4D6",
        gain=0.95,
        blur=0.9,
        noise=0.02,
    ),
    Climate(
        name="boreal",
        group="domain",
        fields=("#A9A56B", "#8D9458", "#BDB27C", "#7C8A5A"),
        wild=("#8A8B5C", "#9D8F63"),
        garden="#8E9170",
        woods=("#16291F", "#33503A"),
        water=("#15242E", "#22343C"),
        roads=("#9A958C", "#6F6F72"),
        roofs=("#8E3B32", "#5A4A44", "#6D6F73", "#B7B2A8", "#40464C"),
        scale=0.9,
        town=0.25,
        forest=0.5,
        lake=0.16,
        river=0.35,
        open_land=0.5,
        curvature=0.6,
        crown=4.5,
        sun=80.0,
        shadow=2.2,
        gain=0.92,
        noise=0.015,
    ),
    Climate(
        name="monsoon",
        group="domain",
        fields=("#8CA65B", "#A9B86E", "#6F9A66", "#B29C6B", "#5F8C72", "#8FA9A0"),
        wild=("#8B9A5A", "#A39A67"),
        garden="#A2977A",
        woods=("#2B4A2C", "#5C8A45"),
        water=("#5B7A72", "#7E9684"),
        roads=("#B4ADA2", "#96928E"),
        roofs=("#5B7FA6", "#B5533E", "#D6D2CA", "#8B8B8F", "#6F98A8"),
        scale=0.7,
        town=0.5,
        forest=0.18,
        lake=0.1,
        river=0.7,
        open_land=0.1,
        curvature=0.35,
        crown=5.0,
        furrows=0.08,
        sun=300.0,
        shadow=0.7,
        haze=0.24,
        haze_colour="#D5D8D4",
        noise=0.01,
    ),
    Climate(
        name="steppe",
        group="pretraining",
        fields=("#BFAE6A", "#A99A5C", "#CDBE84", "#8E8A52"),
        wild=("#AFA268", "#C2B47C"),
        garden="#AA9C74",
        woods=("#3E4A2C", "#6E7A45"),
        water=("#3F6272", "#7C8F88"),
        roads=("#B5A68C", "#86817A"),
        roofs=("#7F8A94", "#A06A50", "#C9C2B4", "#6A645E"),
        scale=0.85,
        town=0.3,
        forest=0.12,
        open_land=0.45,
        curvature=0.3,
        texture_px=8.0,
        sun=200.0,
        shadow=1.1,
    ),
    Climate(
        name="mediterranean",
        group="pretraining",
        fields=("#B29A62", "#8A8F52", "#C4A873", "#9C7A55", "#7C8A4C"),
        wild=("#9A9460", "#B5A274"),
        garden="#A89A76",
        woods=("#34452C", "#67784A"),
        water=("#1F5E86", "#3F93A8"),
        roads=("#B0A89C", "#8A8782"),
        roofs=("#C4714A", "#B5623F", "#D08A63", "#E3DACB", "#A5553A"),
        scale=0.95,
        town=0.42,
        lake=0.1,
        river=0.4,
        curvature=0.75,
        crown=5.0,
        density=0.85,
        sun=20.0,
        shadow=0.9,
        noise=0.008,
    ),
    Climate(
        name="alpine",
        group="pretraining",
        fields=("#86A85A", "#9BB56A", "#74964E"),
        wild=("#8A9A66", "#A7A595"),
        garden="#93A06E",
        woods=("#1D3528", "#41614A"),
        water=("#3E8A8F", "#7FB5AE"),
        roads=("#A7A5A0", "#84858A"),
        roofs=("#6A4A3A", "#8A5A44", "#55504E", "#7C7E82"),
        scale=1.1,
        town=0.25,
        forest=0.42,
        open_land=0.6,
        curvature=1.0,
        crown=5.5,
        relief=0.2,
        sun=160.0,
        shadow=1.6,
    ),
    Climate(
        name="delta",
        group="pretraining",
        fields=("#6FA058", "#8DB56A", "#5A8F6A", "#A4B07A", "#7A8F86"),
        wild=("#7C9A5C", "#8FA06C"),
        garden="#94906E",
        woods=("#22452E", "#4A8048"),
        water=("#6E7F6A", "#8C957A"),
        roads=("#A8957C", "#918A80"),
        roofs=("#9AA5AB", "#B4553F", "#C9C9C4", "#7A6A5C"),
        scale=0.75,
        town=0.3,
        lake=0.18,
        river=0.95,
        open_land=0.1,
        curvature=0.6,
        furrows=0.07,
        sun=330.0,
        shadow=0.6,
        haze=0.14,
    ),
    Climate(
        name="savanna",
        group="pretraining",
        fields=("#B08A52", "#9A8A4C", "#C29C62", "#8A7A44"),
        wild=("#B5985A", "#A8854E"),
        garden="#B3875C",
        woods=("#47522A", "#7C8444"),
        water=("#6B6A4E", "#8F845E"),
        roads=("#B9794E", "#A06E50"),
        roofs=("#A9A39A", "#8A6A50", "#C7BFAE", "#9C5A42"),
        scale=1.15,
        town=0.25,
        forest=0.35,
        open_land=0.8,
        curvature=0.8,
        crown=8.0,
        density=0.45,
        texture_px=6.0,
        texture=0.11,
        sun=100.0,
        shadow=0.8,
        noise=0.016,
    ),
    Climate(
        name="tundra",
        group="pretraining",
        fields=("#8F8F72", "#A09A7C", "#7F8468"),
        wild=("#8A8468", "#A39C86"),
        garden="#9A9684",
        woods=("#2E3A30", "#56604A"),
        water=("#22384A", "#3C5666"),
        roads=("#ABA59A", "#8A8884"),
        roofs=("#3F6A8A", "#A0443A", "#C2C4C6", "#5E6A5A"),
        scale=0.8,
        town=0.2,
        forest=0.12,
        lake=0.25,
        open_land=0.9,
        curvature=0.5,
        crown=3.8,
        density=0.7,
        sun=60.0,
        shadow=2.6,
        haze=0.06,
        gain=0.9,
        noise=0.02,
    ),
    Climate(
        name="prairie",
        group="pretraining",
        fields=("#7FA24A", "#A7B25A", "#D1C27C", "#5F8A44", "#8A6E4E", "#C9A86A"),
        wild=("#98A05E", "#B0A66C"),
        garden="#869A60",
        woods=("#2A4A26", "#587A3A"),
        water=("#3A5A78", "#5E7A8C"),
        roads=("#A09C94", "#6E6E72"),
        roofs=("#6E6A68", "#8A7A6C", "#B4B0AA", "#4E5054", "#96705A"),
        scale=1.2,
        town=0.45,
        forest=0.12,
        lake=0.04,
        open_land=0.08,
        curvature=0.05,
        pivots=0.35,
        furrows=0.06,
        sun=225.0,
        shadow=1.0,
    ),
    Climate(
        name="highland",
        group="pretraining",
        fields=("#9A6A4A", "#B5835A", "#7C7A4A", "#A5925C"),
        wild=("#A07A54", "#8F8A5A"),
        garden="#A4795A",
        woods=("#2F4A38", "#5C7C5A"),
        water=("#2F4E5E", "#56727A"),
        roads=("#C29A76", "#9A8474"),
        roofs=("#B4462E", "#8C8C90", "#D4CFC4", "#A7794F"),
        scale=0.7,
        town=0.38,
        forest=0.22,
        open_land=0.4,
        curvature=0.95,
        relief=0.16,
        sun=290.0,
        shadow=1.2,
        noise=0.014,
    ),
)

CLIMATES: dict[str, Climate] = {climate.name: climate for climate in _LIST}
"""Every climate by name."""
PRETRAINING: tuple[str, ...] = tuple(climate.name for climate in _LIST if climate.group == "pretraining")
"""Climates that pretraining without labels may see; none of them is a source or a target."""
