"""Masks as PNG and TIFF, written row after row: what is held does not grow with the image.

GDAL holds a whole PNG, and says nothing when a disk is full; here Python writes, and raises OSError.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

BLOCK = 512
"""Side in pixels of the tiles of a TIFF."""
_TYPE_SIZE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SHORT, _LONG, _LONG8 = 3, 4, 16
# TIFF 6.0: width, length, offset and size of strips, rows of a strip; width, length, offsets and sizes of tiles
_WIDTH, _LENGTH, _STRIPS, _STRIP_ROWS, _STRIP_SIZES = 256, 257, 273, 278, 279
_TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_SIZES = 322, 323, 324, 325
_OF_THE_SIZE = {_WIDTH, _LENGTH, _STRIPS, _STRIP_ROWS, _STRIP_SIZES, _TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_SIZES}


class Writer(Protocol):
    """Takes an image from top to bottom."""

    def write(self, rows: np.ndarray) -> None:
        """The next rows, [n, W] uint8."""

    def close(self) -> None:
        """End the file; all rows have been written."""


class PngWriter:
    """A PNG of one 8-bit band (ISO/IEC 15948).

    Args:
        file: opened for writing.
        size: (H, W).
        palette: 3 bytes of each value from 0 on, red, green, blue; without, the image is grey.
    """

    def __init__(self, file: BinaryIO, size: tuple[int, int], palette: bytes | None = None) -> None:
        self._file, self._deflate = file, zlib.compressobj()
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 0 if palette is None else 3, 0, 0, 0))
        if palette is not None:
            self._chunk(b"PLTE", palette)

    def write(self, rows: np.ndarray) -> None:
        unfiltered = np.pad(rows, ((0, 0), (1, 0)))  # a row begins with its filter, 0 is none
        self._chunk(b"IDAT", self._deflate.compress(unfiltered))

    def close(self) -> None:
        self._chunk(b"IDAT", self._deflate.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, kind: bytes, data: bytes) -> None:
        if data or kind == b"IEND":
            checksum = zlib.crc32(data, zlib.crc32(kind))
            self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))


class Tag(NamedTuple):
    """A field of a TIFF directory as it is stored, little endian."""

    type: int
    data: bytes


class TiffWriter:
    """A deflated TIFF of one 8-bit band in tiles, or in strips where it is narrower or lower than a tile.

    Args:
        file: opened for writing, can seek.
        size: (H, W). An image of 2 GiB or more becomes a BigTIFF.
        tags: number -> field: all that does not depend on the size, see `read_tags`.
        each: deflates the blocks of a row; that of an executor does so in its threads, to the same bytes.
    """

    BIG_PX = 1 << 31

    def __init__(
        self,
        file: BinaryIO,
        size: tuple[int, int],
        tags: Mapping[int, Tag],
        each: Callable[[Callable[[np.ndarray], bytes], Iterable[np.ndarray]], Iterable[bytes]] = map,
    ) -> None:
        (height, width), self._file, self._each = size, file, each
        self._tiled, self._big = min(size) > BLOCK, height * width >= self.BIG_PX
        self._tags = {number: tag for number, tag in tags.items() if number not in _OF_THE_SIZE}
        self._tags |= {_WIDTH: self._numbers([width]), _LENGTH: self._numbers([height])}
        if self._tiled:
            self._tags |= {_TILE_WIDTH: self._numbers([BLOCK]), _TILE_LENGTH: self._numbers([BLOCK])}
        else:
            self._tags[_STRIP_ROWS] = self._numbers([min(BLOCK, height)])
        self._waiting = np.empty((0, width), np.uint8)
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        # the place of the directory is filled in at the end
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if self._big else struct.pack("<2sHI", b"II", 42, 0))

    def write(self, rows: np.ndarray) -> None:
        rows = np.concatenate((self._waiting, rows)) if len(self._waiting) else rows
        whole = len(rows) // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            self._block_row(rows[first : first + BLOCK])
        self._waiting = rows[whole:].copy()

    def close(self) -> None:
        if len(self._waiting):
            self._block_row(self._waiting)
        place, size = (_TILES, _TILE_SIZES) if self._tiled else (_STRIPS, _STRIP_SIZES)
        self._tags |= {place: self._numbers(self._offsets), size: self._numbers(self._sizes)}
        count, word = ("<Q", "Q") if self._big else ("<H", "I")
        inline = struct.calcsize(word)
        entries = []
        for number, tag in sorted(self._tags.items()):
            data = tag.data
            if len(data) > inline:
                data = struct.pack(f"<{word}", self._put(data))
            entry = struct.pack(f"<HH{word}", number, tag.type, len(tag.data) // _TYPE_SIZE[tag.type])
            entries.append(entry + data.ljust(inline, b"\0"))
        directory = self._put(struct.pack(count, len(entries)) + b"".join(entries) + bytes(inline))
        self._file.seek(8 if self._big else 4)
        self._file.write(struct.pack(f"<{word}", directory))

    def _block_row(self, rows: np.ndarray) -> None:
        if self._tiled:
            height, width = rows.shape
            padded = np.pad(rows, ((0, BLOCK - height), (0, -width % BLOCK)))
            blocks = [padded[:, left : left + BLOCK] for left in range(0, width, BLOCK)]
        else:
            blocks = [rows]
        for data in self._each(_deflated, blocks):
            self._offsets.append(self._put(data))
            self._sizes.append(len(data))

    def _put(self, data: bytes) -> int:
        """Append at an even place, as TIFF wants it."""
        place = self._file.tell()
        if place % 2:
            place += self._file.write(b"\0")
        self._file.write(data)
        return place

    def _numbers(self, values: list[int]) -> Tag:
        kind, code = (_LONG8, "<u8") if self._big else (_LONG, "<u4")
        return Tag(kind, np.array(values, code).tobytes())


def _deflated(block: np.ndarray) -> bytes:
    return zlib.compress(np.ascontiguousarray(block))


def read_tags(tiff: bytes) -> dict[int, Tag]:
    """The fields of the first directory of a small TIFF, little endian and not big."""
    (place,) = struct.unpack_from("<4xI", tiff)
    (count,) = struct.unpack_from("<H", tiff, place)
    tags = {}
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        number, kind, values = struct.unpack_from("<HHI", tiff, entry)
        size, start = values * _TYPE_SIZE[kind], entry + 8
        if size > 4:
            (start,) = struct.unpack_from("<I", tiff, start)
        tags[number] = Tag(kind, tiff[start : start + size])
    return tags
