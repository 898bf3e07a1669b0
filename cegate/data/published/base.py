"""What the converters share: the description of a set, a plan of its preparation, the crop grid, recoding of labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cegate.data.prepared import Counts
from cegate.data.published.downloads import Member
from cegate.data.rasters import read_codes, read_header, read_image
from cegate.errors import ConfigError, DataError, nearest

Options = Mapping[str, str | int]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x is the column, the ends are outside."""
RGB, IRRG = ("red", "green", "blue"), ("infrared", "red", "green")


@dataclass(frozen=True)
class Setting:
    """An option of `cegate data prepare` that some sets take."""

    default: str | int
    help: str
    accepted: tuple[str, ...] = ()
    """Values it takes; empty: any."""

    def parse(self, name: str, text: str) -> str | int:
        """The value of a text.

        Raises:
            ConfigError: it is none of the accepted ones, or no number where one is needed.
        """
        if self.accepted and text not in self.accepted:
            accepted = ", ".join(self.accepted)
            raise ConfigError(f"--{name}={text} is none of {accepted}{nearest(text, self.accepted)}")
        if isinstance(self.default, str):
            return text
        if not text.isdecimal():
            raise ConfigError(f"--{name}={text} is not accepted; expected a whole number of 0 or more")
        return int(text)


@dataclass(frozen=True)
class Label:
    """A label that was read."""

    ids: np.ndarray
    """[H, W] uint8, values as stored in the prepared set."""
    unknown_px: int = 0
    """Pixels whose colour means nothing in this set; they are ignored."""


ReadImage = Callable[[Path], np.ndarray]
"""Path -> [C, H, W] uint8."""
ReadLabel = Callable[[Path], Label]


@dataclass(frozen=True)
class Piece:
    """One downloaded image with its label, and what becomes of them. Travels to other processes."""

    split: str
    name: str
    """Unique in the split; crops append their box."""
    image: Member
    label: Member
    read_label: ReadLabel
    read_image: ReadImage | None = None
    """None: the file is copied as it is."""
    crop: int | None = None
    """Side of the crops; None: the image stays whole."""
    extras: tuple[tuple[str, Member, ReadImage], ...] = ()
    """Further folders beside those of images and labels, each with its file and reader."""


@dataclass(frozen=True)
class Plan:
    """What a download becomes."""

    pieces: list[Piece]
    expected: Mapping[str, Counts]
    """Split -> published numbers."""
    bands: Mapping[str, tuple[str, ...]]
    """Split -> what its bands are."""
    missing: tuple[str, ...] = ()
    """Names of files that are not there, as far as names are known."""
    notes: tuple[str, ...] = ()
    """What was decided by looking at the files."""
    recorded: Options = field(default_factory=dict)
    """Options that the manifest holds in another form than the command line."""


@dataclass(frozen=True)
class Published:
    """A data set of the field."""

    name: str
    title: str
    origin: str
    """Where it comes from."""
    licence: str
    layout: str
    """What a download looks like."""
    classes: tuple[str, ...]
    palette: tuple[str, ...]
    """One "#RRGGBB" per class."""
    stored: Mapping[int, str]
    """Value in the prepared labels -> class name or "ignore"."""
    splits: Mapping[str, Counts]
    """Published numbers with default options."""
    plan: Callable[[Sequence[Member], Options], Plan]
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def parse_options(self, given: Mapping[str, str]) -> dict[str, str | int]:
        """Every option of this set, the given ones parsed.

        Raises:
            ConfigError: an option that the set does not take, or a value that the option does not.
        """
        for name in given:
            if name not in self.settings:
                taken = ", ".join(f"--{option}" for option in self.settings) or "none"
                raise ConfigError(f"{self.name} does not take --{name}; options of this set: {taken}")
        return {
            name: setting.parse(name, given[name]) if name in given else setting.default
            for name, setting in self.settings.items()
        }


def crop_setting(side_px: int) -> Setting:
    """The option `crop`."""
    return Setting(side_px, f"Side of the crops in pixels (default {side_px}).")


def expected_counts(published: Mapping[str, Counts], options: Options, crop: int) -> dict[str, Counts]:
    """Published numbers; with another crop than the published one, images can still be counted, crops cannot."""
    if options["crop"] == crop:
        return dict(published)
    return {split: Counts(counts.images, None) for split, counts in published.items()}


def pair(
    images: Mapping[tuple[str, ...], Member], labels: Mapping[tuple[str, ...], Member]
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Keys that have image and label, in order, and a line for each file whose partner is not there."""
    lonely = [f"the label of {images[key]}" for key in sorted(images.keys() - labels.keys())]
    lonely += [f"the image of {labels[key]}" for key in sorted(labels.keys() - images.keys())]
    return sorted(images.keys() & labels.keys()), tuple(lonely)


def grid_starts(side: int, crop: int) -> list[int]:
    """Where crops start along one side: 0, crop, 2 crop, ... and, where these leave a rest, a last one at the end.

    Raises:
        DataError: the side is shorter than a crop.
    """
    if side < crop:
        raise DataError(f"a side of {side} px is shorter than the crop of {crop} px; give --crop {side} or less")
    return [*range(0, side - crop + 1, crop), *([side - crop] if side % crop else [])]


def crop_boxes(height: int, width: int, crop: int) -> list[Box]:
    """The crops of an image, row by row."""
    return [(x, y, x + crop, y + crop) for y in grid_starts(height, crop) for x in grid_starts(width, crop)]


def recode(path: str | Path, codes: np.ndarray, table: Mapping[int, int], *, colours: bool = False) -> np.ndarray:
    """Replace label codes.

    Args:
        path: the file, for messages.
        codes: [H, W] values, or 0xRRGGBB.
        table: code -> value to store.
        colours: the codes are colours.

    Returns:
        [H, W] uint8.

    Raises:
        DataError: a code that is not in the table; the file, the codes and their pixel counts are named.
    """
    known = sorted(table)
    if codes.dtype == np.uint8:  # most labels: one look-up
        new = np.array([table.get(code, -1) for code in range(256)])[codes]
        bad = new < 0
    else:
        place = np.clip(np.searchsorted(known, codes), 0, len(known) - 1)
        new = np.array([table[code] for code in known])[place]
        bad = np.array(known)[place] != codes
    if bad.any():
        raise DataError(unknown_codes(path, codes[bad], known, colours=colours))
    return new.astype(np.uint8)


def unknown_codes(path: str | Path, found: np.ndarray, known: Sequence[int], *, colours: bool = False) -> str:
    """One line on values that a label should not hold."""
    values, counts = np.unique(found, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    spelled = [f"{_spell(values[k], colours)} ({counts[k]} px)" for k in order[:6]]
    more = f" and {len(order) - 6} more" if len(order) > 6 else ""
    kind = "colours" if colours else "values"
    return (
        f"{path}: {kind} out of range: {', '.join(spelled)}{more}; "
        f"labels of this set hold {', '.join(_spell(code, colours) for code in known)}"
    )


def _spell(code: float, colours: bool) -> str:
    return f"#{int(code):06X}" if colours else f"{code:g}"


def read_values_or_colours(path: Path, values: Mapping[int, int], colours: Mapping[int, int]) -> Label:
    """A label that is released as ids or in colours: a file of one band holds ids, unless it is a palette file (or one
    of three bands) of known colours."""
    if read_header(path).bands >= 3:
        codes = read_codes(path, colours=True)
        if np.isin(codes, list(colours)).all():
            return Label(recode(path, codes, colours, colours=True))
        if (codes % 0x010101).any():  # not grey
            return Label(recode(path, codes, colours, colours=True))
    return Label(recode(path, read_codes(path, colours=False), values))


def read_rgb(path: Path) -> np.ndarray:
    """The first three bands."""
    return read_image(path, bands=(1, 2, 3))


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Stretch every band from its lowest to its highest value over 0..255, rounding down as a cast does.

    Args:
        image: [C, H, W] of any real dtype; what is not finite becomes 0, as does a band of one value.

    Returns:
        [C, H, W] uint8.
    """
    image = image.astype(np.float64)
    finite = np.isfinite(image)
    low = np.where(finite, image, np.inf).min(axis=(1, 2), keepdims=True)
    high = np.where(finite, image, -np.inf).max(axis=(1, 2), keepdims=True)
    span = np.where(high > low, high - low, 1)
    return np.where(finite & (high > low), (np.where(finite, image, 0) - low) / span * 255, 0).astype(np.uint8)
