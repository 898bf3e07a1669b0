"""Sets of images and masks behind one face: files, generated scenes, and either without labels.

Decoded files stay in memory up to `CACHE_BYTES` per set and process, the least recently used leave first. Rasters of
more than `LARGE_PX` pixels are never held: the part asked for is read from the file.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from cegate.config import IGNORE, SecondConfig, SetConfig
from cegate.data import climates, generator
from cegate.data.fingerprint import FINGERPRINT, digest, facts_of
from cegate.data.holdout import boxes_of, hold_out
from cegate.data.label_map import LabelMap
from cegate.data.pairs import Pair
from cegate.data.percentiles import percentiles
from cegate.data.preflight import check_labels
from cegate.data.rasters import (
    DEFAULT_BANDS,
    Header,
    Window,
    misplacement,
    read_header,
    read_image,
    read_mask,
    refuse_hollow,
)
from cegate.data.scale import (
    EIGHT_BIT,
    SCALE_SIDE,
    ValueRange,
    check_depth,
    check_scale,
    has_doubtful_scale,
    to_unit,
)
from cegate.data.second import SecondRasters, scaled
from cegate.data.vector import ShapeLabels
from cegate.errors import ConfigError, DataError

log = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20
LARGE_PX = 2**24
UNLABELLED = 254
"""Label of a pixel of a set that was opened without labels."""


@dataclass(frozen=True)
class Item:
    """One image with its label."""

    image: np.ndarray
    """[C, H, W] float32, 0..1; channels of a second raster come last and are NaN where nothing is known."""
    label: np.ndarray
    """[H, W] uint8, class index or 255; 254 in place of the index in unlabelled sets."""
    name: str
    fit: int | None = None
    """See the set's."""
    second: int = 0
    """Channels of the second raster."""


class SegmentationSet(ABC):
    """Images with labels in one class list. Reading needs no state but a cache, so copies in workers agree.

    Attributes:
        name: the set's name in the configuration.
        classes: class names in the order of their indices.
        bands: 1-based bands that are read.
        value_range: per band, the (low, high) that becomes 0..1.
        labelled: whether there are labels.
        palette: one "#RRGGBB" per class where the set is published with colours, else nothing.
        fit: side of the square that a test image is shrunk to fit; None: it stays as it is.
        second_bands: 1-based bands that are read of a second raster; nothing without one.
        division: what is held out, in words; None where nothing is.
        shares: class -> share of the labelled pixels that `check` looked at; nothing before, or where it does not look.
    """

    labelled: ClassVar[bool] = True

    def __init__(self, name: str, classes: Sequence[str], labels: LabelMap, bands: Sequence[int], nan: str) -> None:
        self.name, self.classes, self.bands = name, tuple(classes), tuple(bands)
        self.value_range: tuple[tuple[float, float], ...] = (EIGHT_BIT,) * len(self.bands)
        self.palette: tuple[str, ...] = ()
        self.fit: int | None = None
        self.second_bands: tuple[int, ...] = ()
        self.division: str | None = None
        self.shares: dict[str, float] = {}
        self._labels, self._nan = labels, nan
        self._cache = _Cache(CACHE_BYTES)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of an item's image by raster: the image's bands, and those of a second raster."""
        return (len(self.bands), *([len(self.second_bands)] if self.second_bands else []))

    @property
    def band_names(self) -> tuple[str, ...]:
        """Of each band that is read; nothing where files do not say."""
        return ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item_name(self, index: int) -> str:
        """Name of an item, unique in the set; for files the part of the path that tells pairs apart."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of an item in pixels."""

    @abstractmethod
    def fingerprint(self, version: int = FINGERPRINT) -> str:
        """Hash of what the set consists of, equal wherever it lies: names, file sizes and (``3:<hash>``) the content of
        every file, of a large one 16 parts evenly spread, or the scenes' recipe.

        Args:
            version: what runs recorded before: 1 sees no other content in files of equal name and size, 2
                (``2:<hash>``) sees the middle and the end of files alone.
        """

    def has_fingerprint(self, recorded: str) -> bool:
        """Whether the set is the one whose fingerprint a run recorded, in whichever version that was."""
        version, colon, _ = recorded.partition(":")
        return recorded == self.fingerprint(int(version) if colon and version in ("2", "3") else 1)

    @abstractmethod
    def check(self, *, training: bool = False) -> None:
        """Look at the header of every file and at a sample of the labels, and say once what is odd.

        Args:
            training: the set is learned from, so every class should occur in it.

        Raises:
            DataError: the first file that is unfit; or labels that nothing can be learned from, see `check_labels`.
        """

    def choose_range(self, given: Sequence[float] | None, like: ValueRange | None) -> None:
        """Settle `value_range`.

        Args:
            given: (low, high) of every band.
            like: what counts where nothing is given: the range of each band in the set that this one goes with.
                Without it, 8-bit pixels are 0..255, and others are scaled by their percentiles in the set.

        Raises:
            ConfigError: given is no range.
            DataError: pixels are not of the depth that the other set's range is for.
        """
        if given is not None:
            if len(given) != 2 or not given[0] < given[1]:
                raise ConfigError(f"set {self.name!r}: value_range={list(given)} is not [low, high] with low < high")
            self.value_range = ((float(given[0]), float(given[1])),) * len(self.bands)
            return
        dtype = self._dtype_of_all()
        if like is None:
            self.value_range = self._own_range()
            return
        self.value_range = tuple((float(low), float(high)) for low, high in like)
        check_depth(dtype, self.value_range, f"set {self.name!r}", "give the set a value_range")
        if has_doubtful_scale(dtype, self.value_range):
            self._look_at_scale()

    def _look_at_scale(self) -> None:
        """Refuse a first image that is scaled otherwise than a range which is not its own."""
        return

    def _dtype_of_all(self) -> str:
        """Of the files, which then must agree."""
        return "uint8"

    def _own_range(self) -> tuple[tuple[float, float], ...]:
        """Of each band, as the set's pixels alone suggest it."""
        return (EIGHT_BIT,) * len(self.bands)

    @abstractmethod
    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        """[C, H, W] in the file's dtype."""

    def _second(self, index: int, window: Window | None) -> np.ndarray:
        """[C, H, W] float32 of the second raster, 0..1, NaN where nothing is known."""
        raise NotImplementedError

    @abstractmethod
    def read_label(self, index: int, window: Window | None = None) -> np.ndarray:
        """[H, W] uint8 label of an item or of a part of it; NaN pixels of the image are not looked at."""

    def read(self, index: int, window: Window | None = None) -> Item:
        """Read an item, or a part of it.

        Raises:
            DataError: missing, damaged or unfit file; NaN pixels where the set does not allow them.
        """
        pixels, label = self._pixels(index, window), self.read_label(index, window)
        image, empty = to_unit(pixels, self.value_range)
        if empty.any():
            if self._nan == "error":
                raise DataError(
                    f"{self._describe(index)}: {int(empty.sum())} of {empty.size} pixels are NaN or infinite in bands "
                    f"{list(self.bands)}; mend the file, or give the set {self.name!r} nan: ignore to leave them out"
                )
            label = np.where(empty, np.uint8(IGNORE), label)
        if self.second_bands:
            image = np.concatenate((image, self._second(index, window)))
        return Item(image, label, self.item_name(index), self.fit, len(self.second_bands))

    def _describe(self, index: int) -> str:
        return self.item_name(index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cache": _Cache(CACHE_BYTES)}  # a worker starts with an empty cache


class _Cache:
    """The most recently used arrays, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._arrays: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def get(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array under key, made if it is not held; never written to."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
        array = make()
        array.flags.writeable = False
        self._arrays[key] = array
        self.held += array.nbytes
        while self.held > self.limit:
            self.held -= self._arrays.popitem(last=False)[1].nbytes
        return array


def _part(array: np.ndarray, window: Window | None) -> np.ndarray:
    return array if window is None else array[..., *window.slices]


class FileSet(SegmentationSet):
    """Pairs of files. A pair's mask has the size of its image, or is made of shapes that are laid over it."""

    def __init__(
        self,
        cfg: SetConfig,
        name: str,
        classes: Sequence[str],
        labels: LabelMap,
        pairs: list[Pair],
        shapes: ShapeLabels | None = None,
    ) -> None:
        super().__init__(name, classes, labels, cfg.bands or DEFAULT_BANDS, cfg.nan)
        self._pairs, self._ignore, self._bands_given = pairs, cfg.ignore, cfg.bands is not None
        self._shapes = shapes
        self._headers: dict[int, Header] = {}
        self._misplaced: dict[str, float] = {}  # mask -> pixels
        self._dtype: str | None = None  # of every file, where the range was not given
        self._rasters: SecondRasters | None = None
        self._header(0)

    def divide(self, fraction: float, seed: int, *, held: bool) -> None:
        """Leave the part that is trained on, or the one that is held out of it; see `cegate.data.holdout`.

        Raises:
            DataError: the set cannot be divided.
        """
        placed = self._header(0).place is not None
        boxes = boxes_of([read_header(pair.image) for pair in self._pairs]) if placed else None
        try:
            division = hold_out([pair.name for pair in self._pairs], boxes, fraction, seed)
        except DataError as error:
            raise DataError(f"set {self.name!r}: {error}") from error
        self.division = f"{len(division.held)} of {len(self)} images are held out {division.how}"
        self._pairs = [self._pairs[k] for k in (division.held if held else division.kept)]
        self._headers.clear()
        self._header(0)

    def add_second(self, cfg: SecondConfig, root: Path, pattern: str) -> None:
        """Read a second raster of every image.

        Raises:
            ConfigError, DataError: its range is none, or files are missing.
        """
        names = {pair.name: pair.image for pair in self._pairs}
        self._rasters = SecondRasters(cfg, root, pattern, names, self.name)
        self.second_bands = self._rasters.bands

    def __len__(self) -> int:
        return len(self._pairs)

    def item_name(self, index: int) -> str:
        return self._pairs[index].name

    @property
    def band_names(self) -> tuple[str, ...]:
        names = self._header(0).names
        chosen = tuple(names[band - 1] for band in self.bands)
        return chosen if len(set(chosen)) == len(set(self.bands)) else ()

    def image_path(self, index: int) -> Path:
        """The image file of an item."""
        return self._pairs[index].image

    def _describe(self, index: int) -> str:
        return str(self._pairs[index].image)

    def size(self, index: int) -> tuple[int, int]:
        return self._header(index).size

    def _header(self, index: int) -> Header:
        """The image's header, once image and mask are known to fit the set and each other."""
        if index not in self._headers:
            pair = self._pairs[index]
            image = read_header(pair.image)
            mask = image if pair.mask is None or self._shapes else read_header(pair.mask)
            refuse_hollow(pair.image, image)
            if max(self.bands) > image.bands:
                read_image(pair.image, self.bands, window=Window(0, 0, 1, 1))  # raises, and says what to do
            if image.size != mask.size:
                raise DataError(
                    f"{pair.mask}: the mask is {mask.width}x{mask.height} pixels, but its image {pair.image} is "
                    f"{image.width}x{image.height}; a mask has the size of its image"
                )
            if self._dtype is not None and image.dtype != self._dtype:
                raise DataError(
                    f"{pair.image}: pixels are {image.dtype}, but the set's first image has {self._dtype}; "
                    "use files of one kind, or set value_range"
                )
            if (off := misplacement(image, mask)) > 1:
                self._misplaced[str(pair.mask)] = off
            self._headers[index] = image
        return self._headers[index]

    def check(self, *, training: bool = False) -> None:
        for index in range(len(self)):
            self._header(index)
        if self._misplaced:
            log.warning(
                "set %r: by their georeferences %d of %d masks do not lie where their images do, the first is %s "
                "(%.1f px off); pixels are paired as they are stored",
                *(self.name, len(self._misplaced), len(self), *next(iter(self._misplaced.items()))),
            )
        self._say_what_is_read()
        if self._rasters and (
            both := {*self.bands} & {*self._rasters.bands}
        ):  # of one file, as infrared beside colours
            for pair, file in zip(self._pairs, self._rasters.files, strict=True):
                if pair.image == file:
                    raise DataError(
                        f"set {self.name!r}: {file} would be its own second raster (band {min(both)} is read for both)"
                        "; mend second.images or second.bands"
                    )
        if self._rasters and (warped := self._rasters.check([self._header(index) for index in range(len(self))])):
            log.warning("%s", warped)
        if masks := [pair.mask for pair in self._pairs if pair.mask is not None]:
            sizes = [self.size(index) for index in range(len(self))]
            labels, ignore = self._labels, self._ignore
            burned = self._burn if self._shapes else None
            self.shares = check_labels(
                self.name, masks, sizes, labels, self.classes, ignore=ignore, training=training, codes_of=burned
            )

    def _say_what_is_read(self) -> None:
        """Nobody chose bands of files that hold more than three, or a file holds more than one image."""
        header = self._header(0)
        bands = [name for name in header.names if name != "alpha"]
        if not self._bands_given and len(bands) > len(self.bands):
            read = ", ".join(f"{k} {header.names[k - 1]}".rstrip() for k in self.bands)
            low, high = zip(*self.value_range, strict=True)
            log.warning(
                "set %r: images have %d bands (%s), of which %s are read, values %g to %g; set bands to choose",
                *(self.name, len(bands), ", ".join(filter(None, bands)) or "without names", read, min(low), max(high)),
            )
        if header.pages > 1:
            log.warning("set %r: %s holds %d images; the first is read", self.name, self._describe(0), header.pages)

    def fingerprint(self, version: int = FINGERPRINT) -> str:
        facts = [
            [p.name, *(fact for file in (p.image, p.mask) if file for fact in facts_of(file, version))]
            for p in self._pairs
        ]
        second = [self._rasters.facts(lambda file: facts_of(file, version))] if self._rasters else []
        codes = (self._shapes or self._labels).codes
        return digest(version, facts, codes, self.classes, self.bands, self.value_range, *second)

    def _whole(self, index: int) -> bool:
        height, width = self.size(index)
        return height * width <= LARGE_PX

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        path = self._pairs[index].image
        if not self._whole(index):
            return read_image(path, self.bands, window=window)
        return _part(self._cache.get(("image", index), lambda: read_image(path, self.bands)), window)

    def _second(self, index: int, window: Window | None) -> np.ndarray:
        header = self._header(index)
        if not self._whole(index):
            return self._rasters.read(index, header, window)
        return _part(self._cache.get(("second", index), lambda: self._rasters.read(index, header)), window)

    def read_label(self, index: int, window: Window | None = None) -> np.ndarray:
        if not self._whole(index):
            return self._mask(index, window)
        return _part(self._cache.get(("label", index), lambda: self._mask(index)), window)

    def _mask(self, index: int, window: Window | None = None) -> np.ndarray:
        path = self._pairs[index].mask
        return self._burn(index, window) if self._shapes else read_mask(path, self._labels, window=window)

    def _burn(self, index: int, window: Window | None = None) -> np.ndarray:
        return self._shapes.burn(self._pairs[index].mask, self._header(index), window)

    def _dtype_of_all(self) -> str:
        self._dtype = self._header(0).dtype
        return self._dtype

    def _look_at_scale(self) -> None:
        part = read_image(self._pairs[0].image, self.bands, window=Window.middle_of(self.size(0), SCALE_SIDE))
        what = f"set {self.name!r}: {self._describe(0)}"
        check_scale(part, self.value_range, what, "give the set a value_range of its own")

    def _own_range(self) -> tuple[tuple[float, float], ...]:
        if self._dtype == "uint8":
            return super()._own_range()
        return percentiles([pair.image for pair in self._pairs], self._header, self.bands, self.name)


class GeneratedSet(SegmentationSet):
    """Procedural scenes of one climate."""

    def __init__(self, cfg: SetConfig, name: str, classes: Sequence[str], labels: LabelMap) -> None:
        super().__init__(name, classes, labels, cfg.bands or DEFAULT_BANDS, cfg.nan)
        if max(self.bands) > 3:
            raise ConfigError(f"set {name!r}: bands={list(self.bands)}, but generated scenes have bands 1, 2 and 3")
        self.climate = climates.CLIMATES[cfg.split]
        self._count = 64 if cfg.limit is None else cfg.limit
        self._first, self._side = cfg.first, cfg.tile or 256
        self._heights = cfg.second
        self.second_bands = () if cfg.second is None else (1,)

    def __len__(self) -> int:
        return self._count

    def item_name(self, index: int) -> str:
        return f"{self.climate.name}/{self._first + index:05d}"

    def size(self, index: int) -> tuple[int, int]:
        return self._side, self._side

    def check(self, *, training: bool = False) -> None:
        """Nothing can be wrong with a drawn scene."""

    def fingerprint(self, version: int = FINGERPRINT) -> str:
        recipe = (repr(self.climate), self._first, self._count, self._side)
        second = [] if self._heights is None else [self._heights.scale, self._heights.value_range]
        return digest(version, recipe, self._labels.codes, self.classes, self.bands, self.value_range, *second)

    def _scene(self, index: int) -> np.ndarray:
        """[4, H, W] uint8: the image's bands and the label."""

        def draw() -> np.ndarray:
            drawn = self._draw(index)
            if self._heights is not None:
                self._cache.get((index, "heights"), lambda: drawn.elevation[None])
            return np.concatenate((drawn.image, drawn.label[None]))

        return self._cache.get((index,), draw)

    def _draw(self, index: int) -> generator.Drawn:
        return generator.draw_scene(self.climate, self._first + index, self._side)

    def _second(self, index: int, window: Window | None) -> np.ndarray:
        metres = self._cache.get((index, "heights"), lambda: self._draw(index).elevation[None])
        if self._heights.scale == "fixed":
            return scaled(_part(metres, window).copy(), [self._heights.value_range], epsilon=0.0)
        return scaled(_part(metres, window).copy(), [(metres.min(), metres.max())])

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        return _part(self._scene(index)[[band - 1 for band in self.bands]], window)

    def read_label(self, index: int, window: Window | None = None) -> np.ndarray:
        return self._labels.apply(_part(self._scene(index)[3], window))[0]


class Unlabelled(SegmentationSet):
    """The images of a set, which is never asked for a label: a pixel's is 254, or 255 where the image has a NaN."""

    labelled = False

    def __init__(self, images: SegmentationSet) -> None:
        super().__init__(images.name, images.classes, images._labels, images.bands, images._nan)
        self.value_range, self.palette = images.value_range, images.palette
        self.second_bands = images.second_bands
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def item_name(self, index: int) -> str:
        return self._images.item_name(index)

    def size(self, index: int) -> tuple[int, int]:
        return self._images.size(index)

    def fingerprint(self, version: int = FINGERPRINT) -> str:
        return self._images.fingerprint(version)

    def check(self, *, training: bool = False) -> None:
        self._images.check()

    def _pixels(self, index: int, window: Window | None) -> np.ndarray:
        return self._images._pixels(index, window)

    def _second(self, index: int, window: Window | None) -> np.ndarray:
        return self._images._second(index, window)

    def _describe(self, index: int) -> str:
        return self._images._describe(index)

    def read_label(self, index: int, window: Window | None = None) -> np.ndarray:
        """Which pixels there are; nothing is read."""
        size = self.size(index) if window is None else (window.height, window.width)
        return np.full(size, UNLABELLED, np.uint8)
