"""Images and masks of a set, found by globs and paired by what their wildcards stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cegate.data.rasters import SUFFIXES
from cegate.errors import ConfigError, DataError


@dataclass(frozen=True)
class Pair:
    """An image file and its mask, if masks were looked for."""

    name: str
    image: Path
    mask: Path | None


def find_pairs(root: Path, images: str, masks: str | None, name: str) -> list[Pair]:
    """Find the image and mask files of a set; without a glob of masks, the images alone.

    Two files belong together when the wildcards of their globs (``*``, ``?``, ``[...]``, ``**``) stand for the same
    text: ``*/img/*_sat.jpg`` and ``*/msk/*_gt.png`` pair ``a/img/7_sat.jpg`` with ``a/msk/7_gt.png``. The file suffix
    does not count.
    A glob that ends in a wildcard takes raster files only.

    Returns:
        Pairs sorted by name, numbers in their natural order.

    Raises:
        ConfigError: the globs have different wildcards, or one is absolute.
        DataError: nothing found, two files with the same open part, or files without a partner.
    """
    if masks is None:
        found = _find(root, images, "images", name)
        return [Pair(_pair_name(key, found[key]), found[key], None) for key in sorted(found, key=_natural)]
    found = [_find(root, pattern, key, name) for pattern, key in ((images, "images"), (masks, "masks"))]
    if _wildcards(images) != _wildcards(masks):
        raise ConfigError(
            f"set {name!r}: images={images!r} and masks={masks!r} have different wildcards, so files cannot be paired; "
            "use the same wildcards in the same order"
        )
    by_image, by_mask = found
    for lonely, kind, pattern in (
        (by_image.keys() - by_mask.keys(), "image", masks),
        (by_mask.keys() - by_image.keys(), "mask", images),
    ):
        if lonely:
            files = by_image if kind == "image" else by_mask
            first = files[min(lonely, key=_natural)]
            other = "mask" if kind == "image" else "image"
            raise DataError(
                f"set {name!r}: {len(lonely)} of {len(files)} {kind}s have no {other} in {root / pattern}, "
                f"first {first}; add the missing files or narrow the globs images={images!r}, masks={masks!r}"
            )
    keys = sorted(by_image, key=_natural)
    return [Pair(_pair_name(key, by_image[key]), by_image[key], by_mask[key]) for key in keys]


def _pair_name(key: tuple[str, ...], image: Path) -> str:
    return "/".join(filter(None, key)) or image.stem


def _find(root: Path, pattern: str, key: str, name: str) -> dict[tuple[str, ...], Path]:
    """Files that match a glob, by the text of its wildcards."""
    if Path(pattern).is_absolute() or not pattern:
        raise ConfigError(f"set {name!r}: {key}={pattern!r} is not a glob below root {root}")
    expression = re.compile(_expression(pattern))
    files: dict[tuple[str, ...], Path] = {}
    for path in sorted(p for p in root.glob(pattern) if p.is_file()):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if match is None:
            continue
        part = tuple(text or "" for text in match.groups())
        if pattern.endswith("*"):
            if path.suffix.lower() not in SUFFIXES:
                continue
            part = (*part[:-1], part[-1].removesuffix(path.suffix))
        if part in files:
            raise DataError(
                f"set {name!r}: {files[part]} and {path} are both {key[:-1]} {'/'.join(part)!r}; keep one of them"
            )
        files[part] = path
    if not files:
        raise DataError(
            f"set {name!r}: no {key} match {root / pattern}; check root={str(root)!r} and {key}={pattern!r}"
        )
    return files


def _wildcards(pattern: str) -> list[str]:
    return re.findall(r"\*\*|\*|\?|\[[^]]*\]", pattern)


def _expression(pattern: str) -> str:
    """A glob as a regular expression with one group per wildcard."""
    groups = {"**/": "(?:(.+)/)?", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}

    def translate(token: str) -> str:
        if token.startswith("[") and len(token) > 2:
            return f"({token.replace('[!', '[^', 1)})"
        return groups.get(token) or re.escape(token)

    return "".join(translate(token) for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]*\]|[^*?\[]+|\[", pattern))


def _natural(key: Sequence[str]) -> list[list[tuple[int, str]]]:
    """Sorts 'a2' before 'a10'."""
    return [[(int(t), "") if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", text)] for text in key]
