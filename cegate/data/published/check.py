"""Does a folder hold what it should: numbers of files, sizes of pairs, values in labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cegate.data.pairs import Pair, find_files, find_pairs, find_second
from cegate.data.prepared import IMAGES, LABELS, SECOND, Manifest, read_manifest
from cegate.data.published.labels import unknown_codes
from cegate.data.published.prepare import run_all
from cegate.data.rasters import SUFFIXES, misplacement, read_codes, read_header
from cegate.errors import DataError

_LISTED = 12


@dataclass(frozen=True)
class Findings:
    """What is wrong, one line each, and the values that were seen."""

    problems: tuple[str, ...] = ()
    values: frozenset[int] = frozenset()


def check_prepared(folder: Path, *, workers: int = 1, console: Console | None = None) -> list[str]:
    """Check every split of a prepared folder and print a table.

    Returns:
        Problems, one line each; empty if all is well. Splits that were prepared from a partial download are no problem.

    Raises:
        DataError: the folder has no manifest that this version reads.
    """
    console = console or Console()
    manifest = read_manifest(folder)
    allowed = sorted(int(value) for value in manifest.label_map)
    table = _table(f"{folder}: {manifest.name}", ("images", "in manifest", "published", "values in labels"))
    problems = [] if manifest.finished else [f"{folder}: preparing was interrupted; run cegate data prepare again"]
    for name, split in manifest.splits.items():
        if split.found.files == 0 and not (folder / IMAGES / name).exists():
            table.add_row(name, "0", "0", _number(split.expected.files), "-")
            continue
        found, pairs = _open_split(folder, name, manifest)
        problems += found
        results = run_all(partial(_check_pair, allowed=allowed), pairs, workers, name, console)
        findings = [result for _, result in results]
        problems += [line for finding in findings for line in finding.problems]
        problems += _check_second(folder, name, pairs)
        values = frozenset().union(*(finding.values for finding in findings))
        numbers = (len(pairs), split.found.files, split.expected.files)
        table.add_row(name, *map(_number, numbers), _ranges(values))
    console.print(table)
    if manifest.partial:
        console.print("The set was prepared with --partial: its numbers are not the published ones.")
    return problems


def check_files(
    root: Path,
    labels: str,
    allowed: Collection[int],
    *,
    images: str | None = None,
    workers: int = 1,
    console: Console | None = None,
) -> list[str]:
    """Check labels of any folder against the values they may hold and, with images, the sizes of the pairs.

    Args:
        root: folder that the globs start from.
        labels: glob of the labels.
        allowed: values they may hold.
        images: glob of the images, with the same wildcards.

    Returns:
        Problems, one line each.

    Raises:
        DataError: nothing matches, or files without partner.
    """
    console = console or Console()
    if images is None:
        files = [path for path in find_files(root, labels) if path.suffix.lower() in SUFFIXES]
        pairs = [Pair(path.name, path, path) for path in files]
        if not pairs:
            raise DataError(f"no labels match {root / labels}; give a glob below the folder, as in 'ann_dir/**/*.png'")
    else:
        pairs = find_pairs(root, images, labels, "check")
    check = partial(_check_pair, allowed=sorted(allowed))
    findings = [result for _, result in run_all(check, pairs, workers, "checking", console)]
    table = _table(f"{root}: {labels}", ("labels", "values", "allowed"))
    values = frozenset().union(*(finding.values for finding in findings))
    table.add_row("all", str(len(pairs)), _ranges(values), _ranges(allowed))
    console.print(table)
    return [line for finding in findings for line in finding.problems]


def summary(problems: Sequence[str]) -> list[str]:
    """The first problems and how many there are beyond."""
    more = len(problems) - _LISTED
    return [*problems[:_LISTED], *([f"and {more} more problems"] if more > 0 else [])]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("split", style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _open_split(folder: Path, name: str, manifest: Manifest) -> tuple[list[str], list[Pair]]:
    """Problems with the files of a split, and its pairs."""
    try:
        pairs = find_pairs(folder, f"{IMAGES}/{name}/*", f"{LABELS}/{name}/*", name)
    except DataError as error:
        return [str(error)], []
    expected = manifest.splits[name].found.files
    if len(pairs) != expected:
        hint = "run cegate data prepare again" if len(pairs) < expected else "move away what is not of the set"
        return [f"{folder / IMAGES / name}: {len(pairs)} images, but the manifest has {expected}; {hint}"], pairs
    return [], pairs


def _check_second(folder: Path, split: str, pairs: list[Pair]) -> list[str]:
    """Problems with the second rasters of a split, if it has any: each image has one of its size."""
    if not (folder / SECOND / split).is_dir():
        return []
    try:
        images = {pair.name: pair.image for pair in pairs}
        files = find_second(folder, f"{SECOND}/{split}/*", images, split)
        return [
            f"{file}: the second raster is {read_header(file).size[::-1]} pixels, its image {image} is of another size"
            for file, image in zip(files, images.values(), strict=True)
            if read_header(file).size != read_header(image).size
        ]
    except DataError as error:
        return [str(error)]


def _check_pair(pair: Pair, allowed: Sequence[int]) -> Findings:
    """Size and values of a pair; image and mask are the same file where only labels are looked at."""
    problems, values = [], frozenset()
    try:
        image, mask = read_header(pair.image), read_header(pair.mask)
        if image.size != mask.size:
            problems.append(
                f"{pair.mask}: the label is {mask.width}x{mask.height} pixels, but its image {pair.image} is "
                f"{image.width}x{image.height}"
            )
        elif (off := misplacement(image, mask)) > 1:
            problems.append(f"{pair.mask}: by its georeference the label lies {off:.1f} px off its image {pair.image}")
        codes = read_codes(pair.mask, colours=False)
        values = frozenset(np.unique(codes).tolist())
        if values - set(allowed):
            problems.append(unknown_codes(pair.mask, codes[~np.isin(codes, allowed)], allowed))
    except DataError as error:
        problems.append(str(error))
    return Findings(tuple(problems), values)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _ranges(values: Collection[int]) -> str:
    """ "0-6, 255" for 0, 1, ... 6 and 255."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) or "-"
