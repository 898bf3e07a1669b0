"""What a download becomes: which files make a sample, into which split it goes, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cegate.data.prepared import SECOND, Counts
from cegate.data.published.downloads import Member, find
from cegate.data.published.labels import ReadImage, ReadLabel, image_reader, label_reader, read_bands
from cegate.errors import ConfigError, DataError, nearest

Options = Mapping[str, str | int]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x is the column, the ends are outside."""
BANDS = {"RGB": ("red", "green", "blue"), "IRRG": ("infrared", "red", "green")}
BANDS |= {"RGBIR": (*BANDS["RGB"], "infrared")}
"""What the bands of a band set are."""


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
    settings: Mapping[str, Setting]
    row: Mapping[str, Any] = field(repr=False)
    """Of the table: how its files are found and read."""

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


@dataclass(frozen=True)
class Extra:
    """A further file of a sample, and the folder that it goes to."""

    folder: str
    member: Member
    read: ReadImage
    suffix: str = ".png"


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
    extras: tuple[Extra, ...] = ()


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


def expected_counts(published: Published, options: Options, counts: Mapping[str, Counts]) -> dict[str, Counts]:
    """Published numbers; with another crop than the published one, images can still be counted, crops cannot."""
    if options.get("crop") == published.row.get("crop"):
        return dict(counts)
    return {split: Counts(of.images, None) for split, of in counts.items()}


def plan_pairs(published: Published, members: Sequence[Member], options: Options) -> Plan:
    """Files whose groups agree; the last group is the name."""
    row, pieces, missing = published.row, [], ()
    read_label, read_image = label_reader(row, published.stored, options), image_reader(row["image"])
    listed = row.get("listed", {"names": ""})
    names = listed["names"].split()
    for part in row["parts"]:
        here = _of_part(part, members)
        images, labels = find(here, part["images"]), find(here, part["labels"])
        second = find(here, row["second"]["file"]) if "second" in row else {}
        keys, gaps = pair(images, labels)
        missing += gaps
        if "second" in row:
            missing += tuple(row["second"]["missing"].format(*key) for key in keys if key not in second)
        missing += tuple(listed["missing"].format(name) for name in names if (name,) not in images)
        for key in keys:
            split = listed["split"] if key[-1] in names else part["split"].format(*key)
            extras = _second(row["second"], second[key]) if key in second else ()
            crop = options.get("crop")
            pieces.append(Piece(split, key[-1], images[key], labels[key], read_label, read_image, crop, extras))
    expected = expected_counts(published, options, published.splits)
    return Plan(pieces, expected, dict.fromkeys(published.splits, BANDS["RGB"]), missing)


def _of_part(part: Mapping[str, str], members: Sequence[Member]) -> Sequence[Member]:
    """Those whose path shows that they belong to a part of the download."""
    if "below" in part:
        return [member for member in members if re.search(part["below"], member.path)]
    if "besides" in part:
        others = [member for member in members if not re.search(part["besides"], member.path)]
        return sorted(set(others), key=lambda member: member.path)
    return members


def _second(row: Mapping[str, Any], member: Member) -> tuple[Extra, ...]:
    in_metres = row.get("metres", False)
    return (Extra(SECOND, member, image_reader(row["bands"]), ".tif" if in_metres else ".png"),)


def plan_tiles(published: Published, members: Sequence[Member], options: Options) -> Plan:
    """Numbered tiles by lists; numbers may have leading zeros. What no list names goes to the split `rest`, if any."""
    row = published.row
    files = lambda template: _tiles(members, template, row["numbers"])  # noqa: E731
    split_of = {tile: split for split, tiles in row["tiles"].items() for tile in tiles.split()}
    labels, missing = {}, []
    for split, templates in row["labels"].items():
        wanted = [tile for tile in split_of if split in ("all", split_of[tile])]
        found: dict[str, Member] = {}
        for template in templates:
            found = files(template) | found
        missing += _gaps(wanted, found, templates[-1])
        labels |= {tile: member for tile, member in found.items() if split in ("all", split_of.get(tile))}
    second = files(row["second"]["file"]) if "second" in row else {}
    missing += _gaps(split_of, second, row["second"]["file"]) if "second" in row else []
    order = [*split_of, *sorted(labels.keys() - split_of.keys())]
    sets = _band_sets(row["images"], options)
    read_label, pieces = label_reader(row, published.stored, options), []
    for name in sets:
        sources = [(files(source["file"]), source["bands"]) for source in row["images"][name]]
        chosen = {tile: (of[tile], bands) for of, bands in reversed(sources) for tile in of}
        missing += _gaps(split_of, chosen, row["images"][name][0]["file"])
        for tile in order:
            split = split_of.get(tile, row.get("rest"))
            if tile not in labels or tile not in chosen or split is None:
                continue
            member, bands = chosen[tile]
            pieces.append(
                Piece(
                    split=f"{name}/{split}" if "bands" in options else split,
                    name=row.get("name", "{tile}").format(tile=tile),
                    image=member,
                    label=labels[tile],
                    read_label=read_label,
                    read_image=partial(read_bands, bands=tuple(map(int, bands.split()))),
                    crop=options.get("crop"),
                    extras=_second(row["second"], second[tile]) if tile in second else (),
                )
            )
    if "bands" not in options:
        expected, bands = published.splits, dict.fromkeys(published.splits, BANDS[sets[0]])
    else:
        expected = {f"{name}/{split}": Counts(*counts) for name in sets for split, counts in row["counts"].items()}
        bands = {split: BANDS[split.partition("/")[0]] for split in expected}
    return Plan(pieces, expected_counts(published, options, expected), bands, tuple(missing))


def _band_sets(known: Iterable[str], options: Options) -> list[str]:
    if "bands" not in options:
        return list(known)
    wanted = str(options["bands"]).split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"--bands={options['bands']}: {unknown[0]!r} is none of {', '.join(known)}{nearest(unknown[0], known)}; "
            "give one, or several with commas between"
        )
    return wanted


def _tiles(members: Sequence[Member], template: str, numbers: str) -> dict[str, Member]:
    """Tile -> file, numbers without leading zeros."""
    pattern = re.escape(template).replace(re.escape("{tile}"), numbers)
    return {"_".join(str(int(k)) for k in key): member for key, member in find(members, pattern).items()}


def _gaps(tiles: Iterable[str], files: Mapping[str, object], template: str) -> list[str]:
    return [template.format(tile=tile) for tile in tiles if tile not in files]
