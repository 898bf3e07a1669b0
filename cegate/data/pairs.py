"""Images and masks of a set, found by globs and paired by what their wildcards stand for."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cegate.data.rasters import SUFFIXES
from cegate.errors import ConfigError, DataError, nearest

log = logging.getLogger(__name__)

VECTOR_SUFFIXES = (".gpkg", ".geojson", ".shp")
"""Files of shapes that masks are burned from."""


@dataclass(frozen=True)
class Pair:
    """An image file and its mask, if masks were looked for."""

    name: str
    image: Path
    mask: Path | None


def find_pairs(root: Path, images: str, masks: str | None, name: str, only: Sequence[str] | None = None) -> list[Pair]:
    """Find the image and mask files of a set; without a glob of masks, the images alone.

    Two files belong together when the wildcards of their globs (``*``, ``?``, ``[...]``, ``**``) stand for the same
    text: ``*/img/*_sat.jpg`` and ``*/msk/*_gt.png`` pair ``a/img/7_sat.jpg`` with ``a/msk/7_gt.png``. The file suffix
    does not count.
    A glob that ends in a wildcard takes raster files only. A mask without wildcards that is a vector file is that of
    every image.

    Args:
        root: folder of the set.
        images, masks: globs below it.
        name: the set's, for messages.
        only: names of the images that count, see `read_names`: the pair's, or the file's, with its folders or without,
            with its suffix or without. Other files need no partner, and may be links to nothing.

    Returns:
        Pairs sorted by name, numbers in their natural order.

    Raises:
        ConfigError: the globs have different wildcards, or one is absolute.
        DataError: nothing found, two files with the same open part, files without a partner, or a name in `only` that
            no image has.
    """
    dead: set[Path] = set()
    lost: set[Path] | None = None if only is None else set()
    if masks is None or (is_vector(masks) and not _wildcards(masks)):
        found = _find(root, images, "images", name, dead, lost)
        _tell_dead(dead)
        mask = None if masks is None else root / masks
        if mask is not None and not mask.is_file():
            raise DataError(f"set {name!r}: no masks match {mask}; check root={str(root)!r} and masks={masks!r}")
        keys = sorted(found if only is None else _chosen(found, only, root, name), key=natural)
        return [Pair(_pair_name(key, found[key]), found[key], mask) for key in keys]
    found = [_find(root, pattern, key, name, dead, lost) for pattern, key in ((images, "images"), (masks, "masks"))]
    _tell_dead(dead)
    if _wildcards(images) != _wildcards(masks):
        raise ConfigError(
            f"set {name!r}: images={images!r} and masks={masks!r} have different wildcards, so files cannot be paired; "
            "use the same wildcards in the same order"
        )
    by_image, by_mask = found
    if only is not None:
        chosen = _chosen(by_image, only, root, name)
        by_image, by_mask = ({key: files[key] for key in files if key in chosen} for files in found)
    for lonely, kind, pattern in (
        (by_image.keys() - by_mask.keys(), "image", masks),
        (by_mask.keys() - by_image.keys(), "mask", images),
    ):
        if lonely:
            files = by_image if kind == "image" else by_mask
            first = files[min(lonely, key=natural)]
            other = "mask" if kind == "image" else "image"
            raise DataError(
                f"set {name!r}: {len(lonely)} of {len(files)} {kind}s have no {other} in {root / pattern}, "
                f"first {first}; add the missing files or narrow the globs images={images!r}, masks={masks!r}"
            )
    keys = sorted(by_image, key=natural)
    return [Pair(_pair_name(key, by_image[key]), by_image[key], by_mask[key]) for key in keys]


def is_vector(path: str | Path) -> bool:
    """Whether masks of that name are drawn shapes, not pixels."""
    return Path(path).suffix.lower() in VECTOR_SUFFIXES


def read_names(path: Path) -> list[str]:
    """Names in a text file, one a line; empty lines and those that begin with ``#`` say nothing.

    Raises:
        DataError: the file is missing, no text, or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"split {path} cannot be read ({error}); give a text file with one name a line") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise DataError(f"split {path} names nothing; write one name a line")
    return list(dict.fromkeys(names))


def _chosen(files: Mapping[tuple[str, ...], Path], only: Sequence[str], root: Path, name: str) -> set[tuple[str, ...]]:
    """Keys of the images that a list names."""
    known: dict[str, set[tuple[str, ...]]] = {}
    for key, path in files.items():
        below = path.relative_to(root).as_posix()
        for alias in {_pair_name(key, path), path.name, path.stem, below, below.removesuffix(path.suffix)}:
            known.setdefault(alias, set()).add(key)
    unknown = [line for line in only if line not in known]
    if unknown:
        hint = nearest(unknown[0], known)
        raise DataError(
            f"set {name!r}: {len(unknown)} of {len(only)} names in split are no image, first {unknown[0]!r}{hint}"
        )
    if twice := [line for line in only if len(known[line]) > 1]:
        raise DataError(
            f"set {name!r}: {twice[0]!r} in split names {len(known[twice[0]])} images; write it with its folders"
        )
    return {key for line in only for key in known[line]}


def find_second(
    root: Path, pattern: str, images: Mapping[str, Path], name: str, *, missing: bool = False
) -> list[Path | None]:
    """The second raster of every image of a set: the file whose wildcards stand for the image's name, or, where the
    glob has none, one file for all.

    Args:
        root: folder of the set.
        pattern: glob below it, or from ``/`` on.
        images: name of each pair -> image.
        name: the set's, for messages.
        missing: an image may have none.

    Raises:
        DataError: an image has none and must have one; nothing is found.
    """
    if Path(pattern).is_absolute():
        root, pattern = Path("/"), pattern.lstrip("/")
    if not _wildcards(pattern):
        file = root / pattern
        if not file.is_file() and not missing:
            raise DataError(f"set {name!r}: no second raster {file}; check second.images={pattern!r}")
        return [file if file.is_file() else None] * len(images)
    dead: set[Path] = set()
    try:
        files = _find(root, pattern, "images", name, dead)
    except DataError as error:
        if not missing or any(True for _ in find_files(root, pattern, dead)):
            raise DataError(f"{error} (second.images)") from error
        files = {}
    by_name = {_pair_name(key, file): file for key, file in files.items()}
    lonely = [image for of, image in images.items() if of not in by_name]
    if lonely and not missing:
        raise DataError(
            f"set {name!r}: {len(lonely)} of {len(images)} images have no second raster in {root / pattern}, first "
            f"{lonely[0]}; add the missing files, mend second.images={pattern!r}, or set second.missing: allow"
        )
    return [by_name.get(of) for of in images]


def _pair_name(key: tuple[str, ...], image: Path) -> str:
    return "/".join(filter(None, key)) or image.stem


def find_files(
    root: Path, pattern: str, dead: set[Path] | None = None, lost: set[Path] | None = None
) -> Iterator[Path]:
    """Files below a folder that match a glob, in a fixed order. Links are followed, those to folders below ``**`` too.

    What hides (a leading dot, as in ``._x.png`` and ``.ipynb_checkpoints``) is left out, unless the glob spells the
    dot; so is ``__MACOSX``.

    Args:
        root: the folder.
        pattern: ``*``, ``?``, ``[...]`` stand for a part of a name, ``**`` for folders at any depth.
        dead: takes links to nothing where a folder that matters might be; default: they are told in the log.
        lost: takes links to nothing that match; default: they are refused.

    Raises:
        DataError: what matches is a link to nothing, and `lost` is not given.
    """
    parts = _parts(pattern)
    fixed = next((k for k, part in enumerate(parts[:-1]) if _wildcards(part)), len(parts) - 1)
    expression = re.compile(expression_of("/".join(parts)))
    spelled = [re.compile(expression_of(part)) for part in parts if part.startswith(".")]
    depth = None if "**" in parts else len(parts)

    def walk(folder: Path, names: tuple[str, ...], above: tuple[str, ...]) -> Iterator[Path]:
        if (real := os.path.realpath(folder)) in above:  # a link to a folder that it lies in
            return
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise DataError(f"{folder} cannot be read ({error.strerror or error})") from error
        for path in paths:
            name = path.name
            if name == "__MACOSX" or (name.startswith(".") and not any(dot.fullmatch(name) for dot in spelled)):
                continue
            here = (*names, name)
            matches = expression.fullmatch("/".join(here)) is not None
            if path.is_dir():
                if depth is None or len(here) < depth:
                    yield from walk(path, here, (*above, real))
            elif path.is_file():
                if matches:
                    yield path
            elif path.is_symlink() and matches:
                if lost is not None:
                    lost.add(path)
                    continue
                raise DataError(f"{path} is a link to {path.readlink()}, which is not there; mend or remove the link")
            elif path.is_symlink() and (depth is None or len(here) < depth):
                if dead is None:
                    _tell_dead({path})
                else:
                    dead.add(path)

    start = root.joinpath(*parts[:fixed])
    if start.is_dir():
        yield from walk(start, tuple(parts[:fixed]), ())


def _tell_dead(links: Iterable[Path]) -> None:
    for link in sorted(links):
        log.warning("%s is a link to %s, which is not there: nothing is read below it", link, link.readlink())


def _parts(pattern: str) -> list[str]:
    """The names of a glob; ``./`` and a doubled ``/`` say nothing."""
    return [part for part in pattern.split("/") if part not in ("", ".")]


def _find(
    root: Path, pattern: str, key: str, name: str, dead: set[Path], lost: set[Path] | None = None
) -> dict[tuple[str, ...], Path]:
    """Files that match a glob, by the text of its wildcards."""
    if Path(pattern).is_absolute() or not _parts(pattern):
        raise ConfigError(f"set {name!r}: {key}={pattern!r} is not a glob below root {root}")
    expression = re.compile(expression_of("/".join(_parts(pattern))))
    files: dict[tuple[str, ...], Path] = {}
    for path in find_files(root, pattern, dead, lost):
        part = tuple(text or "" for text in expression.fullmatch(path.relative_to(root).as_posix()).groups())
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


def expression_of(pattern: str) -> str:
    """A glob as a regular expression with one group per wildcard."""
    groups = {"**/": "(?:(.+)/)?", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}

    def translate(token: str) -> str:
        if token.startswith("[") and len(token.replace("!", "", 1)) > 2:
            return f"({_set_of_letters(token)})"
        return groups.get(token) or re.escape(token)

    return "".join(translate(token) for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]*\]|[^*?\[]+|\[", pattern))


def _set_of_letters(token: str) -> str:
    """``[a-z]`` or ``[!a-z]`` of a glob as that of a regular expression."""
    inside = re.sub(r"([\\^&~|\[])", r"\\\1", token[1:-1].removeprefix("!"))
    expression = f"[{'^' * token.startswith('[!')}{inside}]"
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(f"the glob has {token!r}, which stands for no letters ({error}); mend it") from error
    return expression


def natural(key: Sequence[str]) -> list[list[tuple[int, str]]]:
    """Sorts 'a2' before 'a10'."""
    return [[(int(t), "") if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", text)] for text in key]
