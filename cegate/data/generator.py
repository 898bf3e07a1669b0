"""Procedural land cover: aerial pictures with exact labels, drawn with numpy alone.

A scene is laid out in one warped street frame (u, v): fields and towns fill the blocks between streets, water and woods
follow smooth noise, roads are laid over them and houses along the roads. A `Climate` decides how that looks: colours,
texture, object size, sun, haze and sensor noise. Chance comes from the climate's name, the scene's number and its size.
"""

from __future__ import annotations

import math
import zlib
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from cegate.data.climates import (
    BACKGROUND,
    BUILDING,
    CLIMATES,
    FOREST,
    ROAD,
    WATER,
    Climate,
)
from cegate.errors import ConfigError, DataError, nearest

_BLAS = ThreadpoolController().select(user_api="blas")
_SEA_LEVEL_M, _HILLS_M = 50.0, 100.0  # of the plain, and of a hill whose shading is of full strength


class Drawn(NamedTuple):
    """One scene."""

    image: np.ndarray
    """[3, H, W] uint8: red, green, blue."""
    label: np.ndarray
    """[H, W] uint8, an index into `CLASSES`."""
    elevation: np.ndarray
    """[H, W] float32 metres above sea level of the surface: hills, and the roofs and crowns that throw the shadows. A
    pixel is 1 / `Climate.scale` metres wide."""


def render_scene(climate: str | Climate, number: int, size_px: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of `draw_scene`."""
    return draw_scene(climate, number, size_px)[:2]


def draw_scene(climate: str | Climate, number: int, size_px: int = 256) -> Drawn:
    """Draw one scene. Equal arguments give equal pixels.

    Args:
        climate: a name in `CLIMATES`, or a climate of one's own. Climates of one name share their layouts, so a changed
            copy (`dataclasses.replace`) shows the same place in another light.
        number: which scene, >= 0.
        size_px: side in pixels, >= 16. A larger scene shows more ground at the same pixel size.

    Raises:
        ConfigError: no climate has that name.
        DataError: number or size_px is out of range.
    """
    if isinstance(climate, str):
        if climate not in CLIMATES:
            raise ConfigError(
                f"no climate is called {climate!r}; use one of {', '.join(CLIMATES)}{nearest(climate, CLIMATES)}"
            )
        climate = CLIMATES[climate]
    if number < 0 or size_px < 16:
        raise DataError(f"scene number={number}, size_px={size_px}: use a number of 0 or more and at least 16 pixels")
    rng = np.random.default_rng([zlib.crc32(climate.name.encode()), number, size_px])
    with _BLAS.limit(limits=1):  # the products are small; threads that wait for each other tripled the time
        scene = _Scene(climate, rng, size_px)
        return Drawn(scene.photograph(), scene.label, scene.survey())


def _noise(rng: np.random.Generator, size: int, wavelength: float) -> np.ndarray:
    """Smooth noise [size, size] of zero mean and unit variance: a random lattice seen through a cubic B-spline."""
    nodes = int(np.ceil(size / wavelength)) + 4
    shift = rng.uniform(0, 1, 2)
    rows, columns = (_spline(size, wavelength, nodes, s) for s in shift)
    return rows @ rng.normal(0, 1 / 0.479, (nodes, nodes)).astype(np.float32) @ columns.T


def _spline(size: int, wavelength: float, nodes: int, shift: float) -> np.ndarray:
    """Weights [size, nodes] of a uniform cubic B-spline sampled once a pixel."""
    position = np.arange(size) / wavelength + shift
    cell = position.astype(int)
    t = position - cell
    weights = np.zeros((size, nodes), np.float32)
    pixel = np.arange(size)
    basis = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    for k, value in enumerate(basis):
        weights[pixel, cell + k] = value / 6
    return weights


def _octaves(rng: np.random.Generator, size: int, wavelength: float, count: int, gain: float = 0.5) -> np.ndarray:
    """Sum of `count` noises, each of half the wavelength and `gain` times the strength; unit variance."""
    total = sum(gain**k * _noise(rng, size, max(wavelength / 2**k, 1.5)) for k in range(count))
    return total / math.sqrt(sum(gain ** (2 * k) for k in range(count)))


def _level(share: float) -> float:
    """Height that a unit Gaussian exceeds with probability `share`."""
    return NormalDist().inv_cdf(1 - min(max(share, 1e-6), 1 - 1e-6))


def _rgb(*colours: str) -> np.ndarray:
    """Hex colours as [n, 3] float32, 0..1."""
    return np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in colours], np.float32) / 255


def _mix(low: np.ndarray, high: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Colours between `low` and `high` [3] at t [...]; [..., 3]."""
    t = t.astype(np.float32, copy=False)[..., None]
    return low + (high - low) * t


def _slope(field: np.ndarray) -> np.ndarray:
    """Length of the gradient of a field, per pixel, never zero."""
    dy, dx = np.gradient(field)
    return np.maximum(np.hypot(dx, dy), 1e-6)


def _shift(field: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """The field moved by whole pixels; what comes in from outside repeats the edge."""
    height, width = field.shape
    rows = np.clip(np.arange(height) - dy, 0, height - 1)
    columns = np.clip(np.arange(width) - dx, 0, width - 1)
    return field[rows][:, columns]


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur [H, W, 3] with a three- or five-tap kernel."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    height, width = image.shape[:2]
    padded = np.pad(image, ((2, 2), (0, 0), (0, 0)), mode="edge")
    image = sum(tap * padded[k : k + height] for k, tap in enumerate(taps))
    padded = np.pad(image, ((0, 0), (2, 2), (0, 0)), mode="edge")
    return sum(tap * padded[:, k : k + width] for k, tap in enumerate(taps))


class _Axis:
    """Parallel streets at uneven distances along one coordinate of the street frame."""

    def __init__(self, rng: np.random.Generator, coordinate: np.ndarray, spacing: float) -> None:
        low, high = float(coordinate.min()) - spacing, float(coordinate.max()) + spacing
        steps = rng.uniform(0.75, 1.3, int((high - low) / (0.75 * spacing)) + 3) * spacing
        self.lines = (low - rng.uniform(0, spacing) + np.cumsum(steps) - steps[0]).astype(np.float32)
        self.main = (np.arange(len(self.lines)) + rng.integers(0, 4)) % int(rng.integers(3, 5)) == 0
        self.cell = np.clip(np.searchsorted(self.lines, coordinate) - 1, 0, len(self.lines) - 2)
        self.below = coordinate - self.lines[self.cell]
        self.above = self.lines[self.cell + 1] - coordinate
        self.nearest = self.cell + (self.above < self.below)
        self.distance = np.minimum(self.below, self.above) / _slope(coordinate)  # pixels to the nearest street

    @property
    def cells(self) -> int:
        return len(self.lines) - 1


class _Scene:
    """One place: labels, colours and heights, built in the order of `__init__`."""

    def __init__(self, climate: Climate, rng: np.random.Generator, size: int) -> None:
        self.climate, self.rng, self.size = climate, rng, size
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.float32)
        self.label = np.zeros((size, size), np.uint8)
        self.height = np.zeros((size, size), np.float32)  # pixels
        self._frame()
        self._zones()
        self.colour = self._ground()
        self._flood()
        self._plant()
        self._pave()
        self._build()

    def _length(self, pixels: float) -> float:
        return pixels * self.climate.scale

    def _frame(self) -> None:
        """Street coordinates u, v: the pixel grid turned and bent."""
        rng, size = self.rng, self.size
        angle = rng.uniform(0, 2 * np.pi)
        bend, wavelength = self._length(38) * self.climate.curvature, self._length(190)
        self.bend = [bend * _noise(rng, size, wavelength) for _ in range(2)]
        self.turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], np.float32)
        self.u = self.turn[0, 0] * self.x + self.turn[0, 1] * self.y + self.bend[0]
        self.v = self.turn[1, 0] * self.x + self.turn[1, 1] * self.y + self.bend[1]
        spacing = self._length(62)
        self.across, self.along = _Axis(rng, self.u, spacing), _Axis(rng, self.v, 1.3 * spacing)

    def _zones(self) -> None:
        """Which blocks are town, and which of those hold large buildings."""
        rng, shape = self.rng, (self.across.cells, self.along.cells)
        field = rng.normal(size=(shape[0] + 2, shape[1] + 2))
        urban = sum(field[a : a + shape[0], b : b + shape[1]] for a in range(3) for b in range(3)) / 3
        self.town = urban + rng.normal(0, 0.35) > _level(self.climate.town)
        self.industry = self.town & (rng.random(shape) < 0.12)
        self.in_town = self.town[self.across.cell, self.along.cell]

    def _ground(self) -> np.ndarray:
        """Colours [H, W, 3] of parcels, open land and gardens."""
        climate, rng, size = self.climate, self.rng, self.size
        block = self.across.cell * self.along.cells + self.along.cell
        blocks = self.across.cells * self.along.cells
        lengthwise = (rng.random(blocks) < 0.5)[block]
        width = (self._length(1) * rng.uniform(14, 48, blocks))[block].astype(np.float32)
        position = np.where(lengthwise, self.across.below, self.along.below)
        strip = (position / width).astype(np.int64)
        parcel = block * 64 + np.minimum(strip, 63)

        crops = _rgb(*climate.fields)
        colours = crops[rng.integers(0, len(crops), blocks * 64)] * rng.uniform(0.88, 1.1, (blocks * 64, 1))
        colour = colours.astype(np.float32)[parcel]
        edge = np.minimum(position - strip * width, (strip + 1) * width - position)
        colour[edge < 0.9] *= 0.82
        rows = np.where((rng.random(blocks * 64) < 0.5)[parcel], self.u, self.v)
        strength = (climate.furrows * rng.uniform(0, 1.6, blocks * 64)).astype(np.float32)[parcel]
        colour *= (1 + strength * np.sin(rows * (2 * np.pi / max(self._length(4), 2.5))))[..., None].astype(np.float32)

        self._irrigate(colour, block, blocks)
        wild = _octaves(rng, size, self._length(110), 3)
        tones = _rgb(*climate.wild)
        shade = np.clip(0.5 + 0.35 * _octaves(rng, size, self._length(45), 3), 0, 1)
        colour = np.where((wild > _level(climate.open_land))[..., None], _mix(tones[0], tones[1], shade), colour)

        yard = _octaves(rng, size, self._length(16), 2)
        garden = _mix(_rgb(climate.garden)[0], tones[0], np.clip(0.35 + 0.4 * yard, 0, 1))
        colour = np.where(self.in_town[..., None], garden, colour)
        grain = climate.texture * _octaves(rng, size, climate.texture_px * climate.scale, 3, gain=0.75)
        return colour * (1 + grain)[..., None]

    def _irrigate(self, colour: np.ndarray, block: np.ndarray, blocks: int) -> None:
        """Turn some field blocks into watered circles."""
        pivot = (self.rng.random(blocks) < self.climate.pivots)[block] & ~self.in_town
        half_u, half_v = (self.across.below + self.across.above) / 2, (self.along.below + self.along.above) / 2
        radius = 0.9 * np.minimum(half_u, half_v)
        inside = pivot & ((self.across.below - half_u) ** 2 + (self.along.below - half_v) ** 2 < radius**2)
        tint = self.rng.uniform(0.85, 1.1, blocks).astype(np.float32)[block]
        colour[inside] = (_rgb("#6E8F45") * tint[inside][:, None]) if inside.any() else colour[inside]

    def _flood(self) -> None:
        """Rivers along a level line of smooth noise, lakes above a level; banks around both."""
        climate, rng, size = self.climate, self.rng, self.size
        lake = _octaves(rng, size, self._length(120), 3, gain=0.35) - _level(climate.lake)
        depth = lake / _slope(lake)  # pixels inside the shore
        if rng.random() < climate.river:
            course = _octaves(rng, size, self._length(210), 2, gain=0.25) + rng.normal(0, 0.3)
            river = self._length(rng.uniform(5, 13)) - np.abs(course) / _slope(course)
            depth = np.maximum(depth, river)
        wet = depth > 0
        tones = _rgb(*climate.water)
        self.bank = (depth > -self._length(5)) & ~wet
        self.colour[self.bank] = 0.6 * self.colour[self.bank] + 0.4 * (0.5 * tones[1] + 0.5 * _rgb(climate.garden)[0])
        near_shore = np.exp(-np.maximum(depth, 0) / self._length(6))
        ripple = 0.025 * _octaves(rng, size, self._length(9), 2)
        surface = _mix(tones[0], tones[1], np.clip(near_shore + 0.12 * _noise(rng, size, self._length(60)), 0, 1))
        self.colour = np.where(wet[..., None], surface * (1 + ripple)[..., None], self.colour)
        self.label[wet] = WATER

    def _plant(self) -> None:
        """Woods, crown by crown: a crown stands or not as a whole, so edges are scalloped."""
        climate, rng, size = self.climate, self.rng, self.size
        spacing = max(climate.crown * climate.scale, 2.5)
        distance, centre_y, centre_x, tree = _crowns(rng, self.y, self.x, spacing)
        wood = _octaves(rng, size, self._length(95), 3) - _level(climate.forest) - 0.9 * self.in_town
        luck = rng.random(tree.max() + 1, np.float32)
        wood_here = wood[centre_y, centre_x] > 0
        stands = wood_here & (luck[tree] < climate.density) & (self.label[centre_y, centre_x] == BACKGROUND)
        stands &= (self.label == BACKGROUND) & (distance < (0.95 if climate.density == 1 else 0.62))

        sun = math.radians(climate.sun)
        toward = -((self.x - centre_x) * math.cos(sun) + (self.y - centre_y) * math.sin(sun)) / spacing
        light = np.clip(
            0.55 - 0.75 * distance**2 + 0.7 * toward + 0.12 * rng.standard_normal(luck.shape, np.float32)[tree], 0, 1
        )
        tones = _rgb(*climate.woods)
        tint = rng.uniform(0.85, 1.15, luck.shape).astype(np.float32)[tree]
        leaves = _mix(tones[0], tones[1], light) * tint[..., None]
        self.colour = np.where(stands[..., None], leaves, self.colour)
        floor = ~stands & (wood > 0.12) & (self.label == BACKGROUND)  # the ground between crowns belongs to the wood
        if climate.density == 1:
            self.colour[floor] = 0.8 * tones[0]
        self.label[stands | floor] = FOREST
        self.height = np.where(stands, self._length(4) * (1 - 0.5 * distance**2), self.height)

    def _pave(self) -> None:
        """Main roads everywhere (bridges over water), streets where a neighbouring block is town."""
        climate, rng, size = self.climate, self.rng, self.size
        padded = np.pad(self.town, 1)
        beside_across = padded[:-1, 1:-1] | padded[1:, 1:-1]  # [line, cell along]
        beside_along = padded[1:-1, :-1] | padded[1:-1, 1:]  # [cell across, line]
        main = np.zeros((size, size), bool)
        street = np.zeros((size, size), bool)
        middle = np.full((size, size), np.inf, np.float32)
        wide, narrow = self._length(4.6), self._length(3.0)
        for axis, drawn in (
            (self.across, beside_across[self.across.nearest, self.along.cell]),
            (self.along, beside_along[self.across.cell, self.along.nearest]),
        ):
            is_main = axis.main[axis.nearest]
            main |= is_main & (axis.distance < wide)
            street |= drawn & (axis.distance < narrow) & (self.label != WATER)
            middle = np.where(is_main, np.minimum(middle, axis.distance), middle)
        street &= ~main
        tones = _rgb(*climate.roads) * rng.uniform(0.93, 1.07)
        wear = (1 + 0.04 * _octaves(rng, size, self._length(7), 2))[..., None]
        bridge = main & (self.label == WATER)
        for mask, tone in ((street, tones[0]), (main, tones[1])):
            self.colour = np.where(mask[..., None], tone * wear, self.colour)
            self.label[mask] = ROAD
            self.height[mask] = 0
        self.colour[main & (middle < 0.55)] *= 1.25
        self.height[bridge] = self._length(2)

    def _build(self) -> None:
        """Houses in rows along the streets, halls in industrial blocks, a few farms."""
        plots = np.array(self._plots(), np.float32).reshape(-1, 5)
        x, y = self._locate(plots[:, 0], plots[:, 1])
        margin = self._length(30)
        visible = (np.minimum(x, y) > -margin) & (np.maximum(x, y) < self.size + margin)
        for column, row, (_, _, half_u, half_v, large) in zip(x[visible], y[visible], plots[visible], strict=True):
            self._draw_building(float(column), float(row), float(half_u), float(half_v), bool(large))

    def _plots(self) -> list[tuple[float, float, float, float, bool]]:
        """Centre u, v, half sizes and kind (large) of every building one would like to have."""
        rng = self.rng
        plots: list[tuple[float, float, float, float, bool]] = []
        for i, j in np.ndindex(self.town.shape):
            low_u, high_u = self.across.lines[i : i + 2]
            low_v, high_v = self.along.lines[j : j + 2]
            if self.industry[i, j]:
                plots += self._halls(low_u, high_u, low_v, high_v)
            elif self.town[i, j]:
                plots += self._rows(low_u, high_u, low_v, high_v)
            elif rng.random() < 0.25:
                u = low_u + self._length(rng.uniform(14, 22))
                v = rng.uniform(low_v + 12, high_v - 12)
                plots += [
                    (u, v, self._length(5), self._length(rng.uniform(6, 10)), False),
                    (u + self._length(16), v + self._length(5), self._length(4), self._length(6), False),
                ]
        return plots

    def _rows(self, low_u: float, high_u: float, low_v: float, high_v: float) -> list:
        """Two rows of houses that face the streets at low_u and high_u."""
        rng = self.rng
        depth = self._length(rng.uniform(5, 7))
        frontage = self._length(rng.uniform(13, 20))
        setback = self._length(rng.uniform(5.5, 8)) + depth
        rows = []
        for u in (low_u + setback, high_u - setback):
            for v in np.arange(low_v + self._length(12), high_v - self._length(10), frontage):
                if rng.random() < 0.88:
                    half = frontage * rng.uniform(0.27, 0.42)
                    rows.append(
                        (u + rng.normal(0, 0.7), v + rng.normal(0, 0.6), depth * rng.uniform(0.8, 1.1), half, False)
                    )
        return rows

    def _halls(self, low_u: float, high_u: float, low_v: float, high_v: float) -> list:
        """Two to four large flat roofs that fill a block."""
        rng = self.rng
        cuts = np.linspace(low_v + self._length(9), high_v - self._length(9), int(rng.integers(2, 4)) + 1)
        half_u = (high_u - low_u) / 2 - self._length(rng.uniform(9, 15))
        middle = (low_u + high_u) / 2
        return [(middle, (a + b) / 2, half_u * rng.uniform(0.7, 1), (b - a) * 0.42, True) for a, b in pairwise(cuts)]

    def _locate(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel positions x, y [n] of points of the street frame: a fixed point of the bend."""
        bend = np.zeros((2, len(u)), np.float32)
        for _ in range(4):
            x, y = self.turn.T @ (np.stack((u, v)) - bend)
            row, column = (np.clip(c, 0, self.size - 1).astype(np.int64) for c in (y, x))
            bend = np.stack([field[row, column] for field in self.bend])
        return x, y

    def _draw_building(self, x: float, y: float, half_u: float, half_v: float, large: bool) -> None:
        """Rasterise one roof where it meets neither road nor water."""
        rng, size = self.rng, self.size
        roof, style, wing = self._roof(), rng.random(), rng.random()
        level, jitter = rng.uniform(3.5, 6.5), rng.normal(0, 0.03)
        reach = float(np.hypot(half_u, half_v)) + 1
        top, left = max(int(y - reach), 0), max(int(x - reach), 0)
        bottom, right = min(int(y + reach) + 2, size), min(int(x + reach) + 2, size)
        if half_u < 1.5 or top >= bottom or left >= right:
            return
        row, column = (int(np.clip(c, 1, size - 2)) for c in (y, x))
        du = (self.u[row, column + 1] - self.u[row, column - 1], self.u[row + 1, column] - self.u[row - 1, column])
        angle = math.atan2(du[1], du[0]) + jitter
        c, s = math.cos(angle), math.sin(angle)
        window = np.s_[top:bottom, left:right]
        dx, dy = self.x[window] - x, self.y[window] - y
        a, b = (c * dx + s * dy) / half_u, (c * dy - s * dx) / half_v  # -1..1 inside
        mask = np.maximum(np.abs(a), np.abs(b)) < 1
        if not large and wing < 0.35:
            mask &= ~((a > 0.1) & (b > 0.15))  # L-shaped
        here = self.label[window]
        if not mask.any() or np.isin(here[mask], (ROAD, WATER, BUILDING)).any():
            return
        colour = self._shade_roof(
            a, b, angle, roof, flat=large or style < 0.25, hipped=style > 0.7, long_u=half_u > half_v
        )
        self.colour[window][mask] = colour[mask]
        here[mask] = BUILDING
        self.height[window][mask] = self._length(level * (1.4 if large else 1))

    def _roof(self) -> np.ndarray:
        roofs = _rgb(*self.climate.roofs)
        return roofs[self.rng.integers(0, len(roofs))] * self.rng.uniform(0.88, 1.12)

    def _shade_roof(
        self, a: np.ndarray, b: np.ndarray, angle: float, roof: np.ndarray, *, flat: bool, hipped: bool, long_u: bool
    ) -> np.ndarray:
        """Colours of a flat roof with a parapet, a gable or a hip, lit from the sun's side."""
        if flat:
            rim = np.maximum(np.abs(a), np.abs(b)) > 0.82
            vent = (np.abs(a - 0.3) < 0.14) & (np.abs(b + 0.25) < 0.12)
            return roof * (1 + 0.12 * rim - 0.3 * vent)[..., None].astype(np.float32)
        sun = math.radians(self.climate.sun)
        lit_a, lit_b = -math.cos(sun - angle), -math.sin(sun - angle)  # light on the faces that look along +a and +b
        face_a, face_b = np.sign(a) * lit_a, np.sign(b) * lit_b
        gable = face_b if long_u else face_a
        end = np.abs(a) > 1 - 0.45 * (1 - np.abs(b)) if long_u else np.abs(b) > 1 - 0.45 * (1 - np.abs(a))
        light = np.where(hipped & end, face_a if long_u else face_b, gable)
        return roof * (1 + 0.2 * light)[..., None].astype(np.float32)

    def _shadows(self) -> np.ndarray:
        """True where something higher stands between the pixel and the sun."""
        sun = math.radians(self.climate.sun)
        reach = int(np.ceil(self.height.max() * self.climate.shadow))
        dark = np.zeros((self.size, self.size), bool)
        for step in range(1, reach + 1):
            dy, dx = round(step * math.sin(sun)), round(step * math.cos(sun))
            dark |= _shift(self.height, dy, dx) - step / self.climate.shadow > self.height
        return dark

    def photograph(self) -> np.ndarray:
        """[3, H, W] uint8 as the sensor sees it: light, air, optics, noise."""
        climate, rng, size = self.climate, self.rng, self.size
        image = np.where(self._shadows()[..., None], self.colour * _rgb("#6E7486")[0], self.colour)
        self.hills = _noise(rng, size, self._length(130))
        image *= (1 + climate.relief * self.hills * (self.label != WATER))[..., None]
        image = (image - 0.5) * climate.gain + 0.5 + rng.normal(0, 0.015)
        image += (
            climate.haze * (_rgb(climate.haze_colour)[0] - image) * (1 + 0.25 * _noise(rng, size, 150.0))[..., None]
        )
        image = _blur(image, climate.blur)
        image += climate.noise * rng.standard_normal(image.shape, np.float32)
        return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8).transpose(2, 0, 1).copy()

    def survey(self) -> np.ndarray:
        """[H, W] float32 metres, once the picture is taken."""
        ground = _SEA_LEVEL_M + _HILLS_M * self.climate.relief * self.hills - (self.label == WATER)
        return (ground + self.height / self.climate.scale).astype(np.float32)


def _crowns(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nearest of a jittered lattice of trees: distance over half the spacing, centre row and column, tree number."""
    size = len(y)
    nodes = int(size / spacing) + 4
    offset = rng.uniform(0.2, 0.8, (2, nodes, nodes)).astype(np.float32) - 1
    lattice = np.arange(nodes, dtype=np.float32)
    rows, columns = (offset[0] + lattice[:, None]) * spacing, (offset[1] + lattice) * spacing
    row, column = (np.floor(c / spacing - 0.5).astype(np.int64) + 1 for c in (y, x))
    best = np.full(y.shape, np.inf, np.float32)
    tree = np.zeros(y.shape, np.int64)
    for neighbour in (0, 1, nodes, nodes + 1):  # the four closest cells
        other = row * nodes + column + neighbour
        distance = (y - rows.ravel()[other]) ** 2 + (x - columns.ravel()[other]) ** 2
        closer = distance < best
        best = np.where(closer, distance, best)
        tree = np.where(closer, other, tree)
    centre_y, centre_x = (np.clip(c.ravel()[tree], 0, size - 1).astype(np.int64) for c in (rows, columns))
    return np.sqrt(best) / (0.75 * spacing), centre_y, centre_x, tree
