"""What lies in a folder of images and masks: bands, values, labels, places, what is odd, and what could be held out.

Every header is read, of pixels a sample: evenly spread files, as many as a few seconds allow.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from rasterio.io import DatasetReader

from cegate.config import IGNORE
from cegate.data import prepared
from cegate.data.door import open_raster
from cegate.data.holdout import Division, boxes_of, hold_out, overlaps
from cegate.data.layout import Part, find_parts
from cegate.data.pairs import VECTOR_SUFFIXES, find_files, is_vector
from cegate.data.preflight import windows_of
from cegate.data.rasters import SUFFIXES, Header, open_image, read_codes, read_header, refuse_hollow
from cegate.data.scale import is_measured
from cegate.data.vector import attributes_of
from cegate.errors import DataError

SECONDS = 3.0
"""That each sample may take: of labels, of values, of thumbnails."""
MOST_VALUES = 64
"""Values of a mask; what has more is no mask."""
_MOST_OF_LOSSY = 2
"""Values of a mask that JPEG or its like compressed: flat areas survive it, but edges bring values of no class."""
FRACTION = 0.2
"""Of the images, held out."""
_SAMPLED_PX = 2**16  # of an image
_THUMBNAIL, _THUMBNAIL_PX = 32, 2**22  # side, and size of an image that one is made of
_ALIKE = 0.995  # correlation of two thumbnails
_FIRST_MASKS = 32  # looked at for colours and tags
_FLAT = 2.0  # deviation of a thumbnail that tells nothing, of 255
_MOST_COMPARED = 3000
_COLOURS_OF_SENTINEL_2 = (4, 3, 2)


@dataclass(frozen=True)
class Images:
    """What the images are."""

    names: tuple[str, ...]
    """Of each band; "" where files do not say."""
    dtypes: dict[str, int]
    """Type of pixels -> files."""
    counts: dict[int, int]
    """Number of bands -> files."""
    smallest: tuple[int, int]
    """(H, W) of the smallest."""
    largest: tuple[int, int]
    systems: dict[str, int]
    """Coordinate system -> files that have it."""
    pixel_sizes: tuple[float, float] | None
    """Smallest and largest, in the unit of the system."""
    units: tuple[str, ...]
    """Of the systems, as GDAL names them."""
    nodata: tuple[float, ...]
    """Tags."""
    ranges: tuple[tuple[float, float], ...] = ()
    """1st and 99th percentile of each band, in the sample."""
    has_nan: bool = False


@dataclass(frozen=True)
class Labels:
    """What the masks hold."""

    shares: dict[int | str, float]
    """Value, '#RRGGBB' or text of the attribute -> share of the pixels looked at (of shapes: 0, they are not counted),
    in order."""
    looked_at: int
    masks: int
    colours: bool = False
    nodata: tuple[float, ...] = ()
    """Tags of the masks."""
    attribute: str | None = None
    """Of shapes: what seems to hold the class."""
    problem: str | None = None
    """Why they cannot be read as labels."""


@dataclass(frozen=True)
class Survey:
    """All about a folder."""

    root: Path
    part: Part
    """What would be trained on."""
    validation: Part | None
    test: Part | None
    others: tuple[Part, ...]
    """Further ways to pair images and masks."""
    images: Images
    labels: Labels
    division: Division | None = None
    """What could be held out, where no part is called so."""
    usable: tuple[str, ...] | None = None
    """Names of the pairs that can be used, where not all can."""
    odd: tuple[str, ...] = field(default=())
    """What one should know, a line each."""


def survey(root: Path) -> Survey:
    """Look at a folder.

    Raises:
        DataError: there is no such folder, or no image with a mask in it; what was found is said.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds images and masks")
    lost: set[Path] = set()
    files = [
        PurePosixPath(path.relative_to(root).as_posix())
        for path in find_files(root, "**/*", lost=lost)
        if path.suffix.lower() in (*SUFFIXES, *VECTOR_SUFFIXES)
    ]
    odd = [f"{len(lost)} links lead nowhere, first {min(lost).relative_to(root)}"] if lost else []
    # globs find links too, and training refuses those to nothing where no list of names leaves them out
    parts = [replace(part, is_exact=part.is_exact and not lost) for part in find_parts(files)]
    if not parts:
        raise DataError(f"{root}: {'; '.join([_describe_files(files), *odd, _LAYOUTS])}")
    part, validation, test = _choose(root, parts)
    headers = _headers(root, part, odd)
    if not headers:
        raise DataError(f"{root}: no pair can be used: {odd[-1]}")
    pairs = [(name, root / image, root / mask) for name, image, mask in part.pairs if name in headers]
    placed = [headers[name] for name, *_ in pairs]
    boxes = boxes_of(placed)
    names = [name for name, *_ in pairs]
    images = _look_at_images([image for _, image, _ in pairs], placed)
    odd += (
        _odd_files(part)
        + _odd_images(images)
        + _unplaced(names, placed)
        + _neighbours(names, [image for _, image, _ in pairs], placed, boxes)
    )
    if (root / prepared.FILE).is_file():
        odd.append("this is a prepared set, whose classes are known: give kind: prepared and a split in place of globs")
    division = None
    if validation is None:
        try:
            division = hold_out(names, boxes, FRACTION)
        except DataError as error:
            odd.append(f"nothing is held out: {str(error).partition(';')[0]}")
    chosen = {part, validation, test}
    all_of_it = len(headers) == len(part.pairs) and part.is_exact
    masks = [mask for _, _, mask in pairs]
    masks += [root / mask for beside in (validation, test) if beside is not None for _, _, mask in beside.pairs]
    labels = _look_at_labels(masks)
    if part.is_guess:
        if labels.problem:
            raise DataError(f"{root}: {_describe_files(files)}; {_LAYOUTS}")
        odd.append(f"nothing is called after masks; {part.masks} are taken for them, by their names")
    return Survey(
        root=root,
        part=part,
        validation=validation,
        test=test,
        others=tuple(p for p in parts if p not in chosen),
        images=images,
        labels=labels,
        division=division,
        usable=None if all_of_it else tuple(image.as_posix() for name, image, _ in part.pairs if name in headers),
        odd=tuple(odd),
    )


_LAYOUTS = (
    "usual are images/ beside masks/ (or img and label, img_dir and ann_dir) with the same names, or names such as "
    "7_img.png and 7_mask.png; other layouts are written by hand, see data.source.images in cegate train --help"
)


def _describe_files(files: Sequence[PurePosixPath]) -> str:
    if not files:
        return "no image lies in it"
    folders = Counter(file.parent.as_posix() for file in files)
    shown = ", ".join(f"{folder} ({count})" for folder, count in folders.most_common(4))
    return f"{len(files)} images, but no masks of the same names, in {shown}"


def _choose(root: Path, parts: Sequence[Part]) -> tuple[Part, Part | None, Part | None]:
    """What is trained on, and what is called validation and test beside it."""
    learnable = [part for part in parts if part.stage == "train"] or [part for part in parts if not part.stage] or parts
    most = max(len(part.pairs) for part in learnable)
    equal = [part for part in learnable if len(part.pairs) == most]
    chosen = min(equal, key=lambda part: _worth(root, part))  # the first of equals

    def beside(stage: str) -> Part | None:
        like = [part for part in parts if part.stage == stage and part is not chosen]
        wanted = _plain(chosen.images), _plain(chosen.masks)
        return next((part for part in like if (_plain(part.images), _plain(part.masks)) == wanted), None)

    return chosen, beside("val"), beside("test")


def _plain(pattern: str) -> str:
    """A glob without the words that tell train from val and test."""
    for word in ("training", "train", "validation", "valid", "val", "testing", "test"):
        pattern = pattern.lower().replace(word, "*")
    return pattern


def _worth(root: Path, part: Part) -> int:
    """0 for masks of one band in the size of their images; more for others."""
    first = part.pairs[0][2]
    if is_vector(first):
        return 3
    try:
        sizes = {
            (read_header(root / image).size == read_header(root / mask).size) for _, image, mask in part.pairs[:64]
        }
        with open_raster(root / first) as src:
            colours = src.count > 1
    except DataError:
        return 2
    return 2 * (False in sizes) + colours


def _headers(root: Path, part: Part, odd: list[str]) -> dict[str, Header]:
    """Name -> the image's, of the pairs that can be used."""
    found, bad = {}, []
    for name, image, mask in part.pairs:
        try:
            header = read_header(root / image)
            refuse_hollow(root / image, header)
            of_mask = header if is_vector(mask) else read_header(root / mask)
        except DataError as error:
            bad.append(str(error))
            continue
        if header.size != of_mask.size:
            sizes = f"{of_mask.width}x{of_mask.height} for {header.width}x{header.height}"
            bad.append(f"{mask} is not of the size of its image ({sizes})")
        else:
            found[name] = header
    counts = Counter(header.bands for header in found.values())
    if counts:
        least = counts.most_common(1)[0][0]
        fewer = [name for name, header in found.items() if header.bands < min(least, 3)]
        bad += [f"{name} has fewer bands than the others" for name in fewer]
        kinds = Counter(header.dtype for header in found.values())
        usual = kinds.most_common(1)[0][0]
        other = [name for name, header in found.items() if header.dtype != usual]
        bad += [f"{name} is {found[name].dtype}, most are {usual}" for name in other]
        found = {name: header for name, header in found.items() if name not in {*fewer, *other}}
    if bad:
        odd.append(f"{len(bad)} of {len(part.pairs)} pairs cannot be used, first: {bad[0]}")
    return found


def _odd_files(part: Part) -> list[str]:
    lines = []
    if part.lonely_images:
        lines.append(f"{len(part.lonely_images)} images have no mask, first {part.lonely_images[0]}")
    if part.lonely_masks:
        lines.append(f"{len(part.lonely_masks)} masks have no image, first {part.lonely_masks[0]}")
    return lines


# --- images ---------------------------------------------------------------------------------------------------------


def _spread(items: Sequence) -> Iterator:
    """All items, each next one far from those before, as long as time allows; three in any case."""
    until = time.monotonic() + SECONDS
    order = sorted(range(len(items)), key=lambda k: k * 0.6180339887498949 % 1)
    for done, k in enumerate(order):
        if done >= 3 and time.monotonic() > until:
            return
        yield k, items[k]


def _look_at_images(paths: Sequence[Path], headers: Sequence[Header]) -> Images:
    first = Counter(header.bands for header in headers).most_common(1)[0][0]
    example = next(header for header in headers if header.bands == first)
    places = [header.place for header in headers if header.place is not None]
    sides = [float(np.sqrt(abs(np.linalg.det(matrix[:2, :2])))) for matrix, _ in places]
    samples, has_nan = [], False
    for k, path in itertools.islice(_spread(paths), 32):
        height, width = headers[k].size
        with open_image(path) as image:
            pixels = image.every_nth(-(-height * width // _SAMPLED_PX), range(1, example.bands + 1)).astype(np.float64)
        has_nan |= bool(np.isnan(pixels).any())
        tags = np.array([np.nan if tag is None else tag for tag in headers[k].nodata[: example.bands]])[:, None]
        samples.append(np.where(is_measured(pixels) & (pixels != tags), pixels, np.nan))
    values = np.concatenate(samples, axis=1)
    ranges = (np.percentile(row[~np.isnan(row)], (1, 99)) if (~np.isnan(row)).any() else (0, 0) for row in values)
    return Images(
        names=example.names,
        dtypes=dict(Counter(header.dtype for header in headers)),
        counts=dict(Counter(header.bands for header in headers)),
        smallest=min((header.size for header in headers), key=lambda size: size[0] * size[1]),
        largest=max((header.size for header in headers), key=lambda size: size[0] * size[1]),
        systems=dict(Counter("without a system" if s is None else s.to_string()[:40] for _, s in places)),
        pixel_sizes=(min(sides), max(sides)) if sides else None,
        units=tuple({"" if s is None else s.units_factor[0]: None for _, s in places}),
        nodata=tuple(sorted({tag for header in headers for tag in header.nodata if tag is not None and tag == tag})),
        ranges=tuple((float(low), float(high)) for low, high in ranges),
        has_nan=has_nan,
    )


def _odd_images(images: Images) -> list[str]:
    lines = []
    if len(images.counts) > 1:
        lines.append(f"numbers of bands differ: {counted(images.counts)}")
    if len(images.systems) > 1:
        lines.append(f"{len(images.systems)} coordinate systems")
    if images.pixel_sizes and images.pixel_sizes[1] > 1.5 * images.pixel_sizes[0] and len(images.systems) == 1:
        lines.append("pixel sizes differ: {:g} to {:g}".format(*images.pixel_sizes))
    if images.has_nan:
        lines.append("some pixels are NaN")
    return lines


def _unplaced(names: Sequence[str], headers: Sequence[Header]) -> list[str]:
    """Images without a coordinate system where others have one."""
    without = [name for name, h in zip(names, headers, strict=True) if h.place is None or h.place[1] is None]
    if not 0 < len(without) < len(names):
        return []
    return [f"{len(without)} of {len(names)} images have no coordinate system, first {without[0]}"]


def _neighbours(
    names: Sequence[str], paths: Sequence[Path], headers: Sequence[Header], boxes: np.ndarray | None
) -> list[str]:
    """Images that show the same ground by their georeferences, and such that look alike."""
    lines = []
    if boxes is not None and len(boxes) <= _MOST_COMPARED:
        pairs = np.argwhere(np.triu(overlaps(boxes, boxes), 1))
        if len(pairs):
            a, b = pairs[0]
            lines.append(f"{len(pairs)} pairs of images overlap, first {names[a]} and {names[b]}")
    thumbnails, shown = [], []
    for k, path in itertools.islice(_spread(paths), _MOST_COMPARED):
        if headers[k].height * headers[k].width > _THUMBNAIL_PX:
            continue
        with open_raster(path) as src:
            small = src.read(1, out_shape=(_THUMBNAIL, _THUMBNAIL)).astype(np.float64).ravel()
        small = np.nan_to_num(small, posinf=0, neginf=0)
        spread = small.std()
        if spread > _FLAT or (headers[k].dtype != "uint8" and spread > 0):
            thumbnails.append((small - small.mean()) / spread / _THUMBNAIL)
            shown.append(k)
    if len(thumbnails) > 1:
        stack = np.stack(thumbnails)
        alike = np.argwhere(np.triu(stack @ stack.T > _ALIKE, 1))
        if len(alike):
            a, b = sorted(shown[k] for k in alike[0])
            lines.append(f"{len(alike)} pairs of images are nearly the same, first {names[a]} and {names[b]}")
    return lines


# --- labels ---------------------------------------------------------------------------------------------------------


def _look_at_labels(masks: Sequence[Path]) -> Labels:
    if is_vector(masks[0]):
        return _look_at_shapes(masks)
    counts: Counter[int] = Counter()
    tags: set[float] = set()
    colours, most, looked = False, MOST_VALUES, 0
    try:
        for _, mask in itertools.islice(_spread(masks), _FIRST_MASKS):
            with open_raster(mask) as src:
                most = _MOST_OF_LOSSY if _is_lossy(src) else most
                tags |= {tag for tag in src.nodatavals if tag is not None}
                if src.count >= 3 and not colours:
                    pixels = src.read(indexes=[1, 2, 3])
                    colours = not ((pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all())
        for _, mask in _spread(masks):
            for window in windows_of(read_header(mask).size):
                values, numbers = np.unique(read_codes(mask, colours=colours, window=window), return_counts=True)
                counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
            looked += 1
            if len(counts) > 4 * MOST_VALUES:
                break
    except DataError as error:
        return Labels({}, looked, len(masks), problem=str(error))
    problem = None
    if any(value != value or not float(value).is_integer() for value in counts):
        problem = "masks hold fractions or NaN; write them anew with whole numbers"
    elif len(counts) > most:
        what = "colours" if colours else "values"
        problem = (
            f"masks hold {len(counts)} {what} or more, as JPEG or smoothing leaves them; write them anew with one "
            "number for each class"
        )
    total = sum(counts.values())
    shares = {} if problem else {_spell(value, colours): counts[value] / total for value in sorted(counts)}
    return Labels(shares, looked, len(masks), colours, tuple(sorted(tags)), problem=problem)


def _is_lossy(src: DatasetReader) -> bool:
    told = src.tags(ns="IMAGE_STRUCTURE")
    is_jpeg = src.driver == "JPEG" or "JPEG" in told.get("COMPRESSION", "")
    return is_jpeg or told.get("COMPRESSION_REVERSIBILITY") == "LOSSY"


def _spell(value: float, colours: bool) -> int | str:
    return f"#{int(value):06X}" if colours else int(value)


_CLASS_WORDS = ("class", "klass", "classe", "label", "type", "category", "code", "kind", "name", "cls")


def _look_at_shapes(masks: Sequence[Path]) -> Labels:
    """The attribute that seems to hold the class, and its values."""
    files = list(dict.fromkeys(masks))
    try:
        tables = [attributes_of(path) for path in files[:32]]
    except DataError as error:
        return Labels({}, 0, len(files), problem=str(error))
    values: dict[str, set[str]] = {}
    for table in tables:
        for name, found in table.items():
            values.setdefault(name, set()).update(found)
    few = [name for name, found in values.items() if 1 < len(found) <= MOST_VALUES]
    by_word = [name for word in _CLASS_WORDS for name in few if word in name.lower()]
    attribute = next(iter(by_word), None)
    classes = sorted(values[attribute]) if attribute else ["1"]
    return Labels(dict.fromkeys(classes, 0.0), len(tables), len(files), attribute=attribute)


# --- what to think of it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meaning:
    """Classes as they are assumed, to be named by who knows them."""

    classes: tuple[str, ...]
    label_map: dict[int | str, int | str] | None
    """Value, colour or text -> class, by its index or name, or "ignore"; None: values are indices."""
    palette: tuple[str, ...]
    why: str


def meaning_of(labels: Labels) -> Meaning:
    """What values of masks probably mean: 0 and 1, or 0 and 255, are background and foreground; 255 beside others,
    negative values and what a tag calls nodata are no label; stray colours neither."""
    if labels.problem:
        raise DataError(labels.problem)
    found = labels.shares
    if isinstance(next(iter(found)), str) and not labels.colours:
        return _meaning_of_shapes(labels)
    if labels.colours:
        kept = [colour for colour, share in found.items() if share >= 1e-4] or list(found)
        stray = [colour for colour in found if colour not in kept]
        names = [f"class_{k}" for k in range(len(kept))] + ["other"] * (len(kept) == 1)
        table = {colour: k for k, colour in enumerate(kept)} | dict.fromkeys(stray, "ignore")
        why = f"each colour is a class{'; colours of less than 0.01 % are stray' if stray else ''}"
        return Meaning(tuple(names), table, tuple(kept) if len(kept) == len(names) else (), why)
    values = list(found)
    none = [value for value in values if value < 0 or (value in labels.nodata and value != 0)]
    if IGNORE in values and not {*values} <= {0, IGNORE}:
        none.append(IGNORE)
    real = [value for value in values if value not in none]
    told = f"; {', '.join(map(str, dict.fromkeys(none)))} is no label" if none else ""
    unknown = [value for value in none if value != IGNORE]
    if set(real) <= {0, 1} or set(real) == {0, IGNORE}:
        high = IGNORE if IGNORE in real else 1
        mapping = {0: 0, high: 1, **dict.fromkeys(unknown, "ignore")}
        plain = high == 1 and not unknown
        why = f"0 is background, {high} is foreground{told}"
        return Meaning(("background", "foreground"), None if plain else mapping, (), why)
    if labels.looked_at < labels.masks and real and max(real) - min(real) < 2 * len(real):
        real = list(range(min(real), max(real) + 1))  # masks that were not looked at may hold what lies between
    names = [f"class_{value}" for value in real]
    if len(names) == 1:
        names.append("other")
    mapping = {value: k for k, value in enumerate(real)} | dict.fromkeys(unknown, "ignore")
    plain = real == list(range(len(real))) and not unknown
    return Meaning(tuple(names), None if plain else mapping, (), f"each value is a class{told}")


def _meaning_of_shapes(labels: Labels) -> Meaning:
    outside = "what no shape covers is background"
    if labels.attribute is None:
        return Meaning(("background", "foreground"), None, (), f"every shape is foreground, {outside}")
    table = {value: "ignore" if value == str(IGNORE) else _class_name(value) for value in labels.shares}
    names = dict.fromkeys(["background", *(name for name in table.values() if name != "ignore")])
    why = f"{labels.attribute!r} holds the class, {outside}"
    return Meaning(tuple(names), {**table, "": "background"}, (), why)


def _class_name(value: str) -> str:
    return f"class_{value}" if value.isdecimal() or value == "ignore" else value


def bands_of(images: Images) -> tuple[list[int] | None, str | None]:
    """Bands to read, None where the first three are right; and why, where that is not plain."""
    names = [name.lower() for name in images.names]
    count = len(names)
    if count == 1:
        return [1, 1, 1], "one band, given three times as a backbone of colours takes it"
    if count == 2:
        return [1, 2], "both bands"
    colours = [next((k for k, name in enumerate(names, 1) if name in spelled), None) for spelled in _SPELLINGS]
    if None not in colours:
        return (None, None) if colours == [1, 2, 3] else (colours, "red, green and blue by their names")
    if count in (12, 13):
        return list(
            _COLOURS_OF_SENTINEL_2
        ), f"{count} bands without names, taken for those of Sentinel-2: red, green, blue"
    return None, (f"the first three of {count} bands" if count > 3 else None)


_SPELLINGS = (("red", "b04", "b4", "r"), ("green", "b03", "b3", "g"), ("blue", "b02", "b2", "b"))


def counted(counts: dict) -> str:
    """What there is, and how often where it is more than one."""
    shown = ", ".join(f"{key}" if len(counts) == 1 else f"{key} ({count})" for key, count in list(counts.items())[:4])
    return f"{shown}, …" if len(counts) > 4 else shown
