"""Labels counted before anything is trained or measured: what cannot be learned is refused, what is odd is said.

A sample is looked at: at most `_MASKS` masks, evenly spread, and of a large one nine windows at full resolution, so
that thin classes are seen.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cegate.config import IGNORE
from cegate.data.label_map import LabelMap
from cegate.data.rasters import Window, read_codes, read_mask
from cegate.errors import DataError

log = logging.getLogger(__name__)

_MASKS = 36
_DECODED_PX = 150_000_000  # of compressed masks, about a second
_WHOLE_PX = 1536**2  # a larger mask is looked at in windows
_SIDE = 512


def check_labels(
    name: str,
    masks: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    labels: LabelMap,
    classes: Sequence[str],
    *,
    ignore: int = IGNORE,
    training: bool,
    codes_of: Callable[[int, Window | None], np.ndarray] | None = None,
) -> dict[str, float]:
    """Count the labels of a set and judge them.

    Args:
        name: the set's, for messages.
        masks: the files.
        sizes: (H, W) of each.
        labels: what their values mean.
        classes: class names in the order of their indices.
        ignore: the mask value that is ignored.
        training: the set is learned from: classes that never occur are told, and pixels that are all ignored refused.
        codes_of: gives what a mask holds, by its number and the part wanted; default: it is read from the file.

    Returns:
        Class -> share of the pixels looked at that are not ignored; nothing where all are.

    Raises:
        DataError: two classes in masks of 0 and 255 without a map; values outside the map; nothing but ignored pixels.
    """
    hidden = ignore if not labels.given and ignore < len(classes) else None
    if hidden is not None:
        log.warning(
            "set %r: ignore: %d hides class %r, whose pixels have that value; leave ignore out, or give a label_map",
            *(name, ignore, classes[ignore]),
        )
    chosen = choose_masks(sizes)
    counts: Counter[int] = Counter()
    for index in chosen:
        for window in windows_of(sizes[index]):
            if codes_of is None:
                codes = read_codes(masks[index], colours=labels.colours, window=window)
            else:
                codes = codes_of(index, window)
            values, numbers = np.unique(codes, return_counts=True)
            counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
            if labels.apply(values)[1].any():
                _refuse_unmapped(masks[index], labels, window, counts, classes, ignore)
    meaning = dict(labels.codes)
    found = {meaning[code] for code in counts} - {IGNORE}
    seen = "all masks" if len(chosen) == len(masks) else f"{len(chosen)} of {len(masks)} masks"
    if not labels.given and ignore == IGNORE and counts.keys() == {0, IGNORE} and len(classes) == 2:
        raise DataError(
            f"set {name!r}: masks hold 0 and 255 and nothing else (in {seen}), and 255 is ignored, so {classes[1]!r} "
            f"never occurs; if 255 is {classes[1]!r}, give the set label_map: {{0: {classes[0]}, 255: {classes[1]}}}, "
            f"else label_map: {{0: {classes[0]}, 255: ignore}}"
        )
    if not found:
        text = f"set {name!r}: every pixel looked at is ignored (in {seen}; values {_spell(counts, labels)})"
        if training or len(chosen) == len(masks):
            raise DataError(f"{text}, so there is nothing to learn or to measure; mend label_map or ignore")
        log.warning("%s", text)
    elif training and (absent := [c for k, c in enumerate(classes) if k not in found and k != hidden]):
        log.warning(
            "set %r: %s never occur%s (in %s); what never occurs is not learned",
            *(name, ", ".join(map(repr, absent)), "s" * (len(absent) == 1), seen),
        )
    pixels = Counter()
    for code, number in counts.items():
        pixels[meaning[code]] += number
    total = sum(number for index, number in pixels.items() if index != IGNORE)
    return {c: pixels[k] / total for k, c in enumerate(classes)} if total else {}


def choose_masks(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Evenly spread masks, fewer where they are large."""
    height, width = sizes[0]
    count = min(len(sizes), max(4, min(_MASKS, _DECODED_PX // (height * width))))
    return np.unique(np.linspace(0, len(sizes) - 1, count).round().astype(int)).tolist()


def windows_of(size: tuple[int, int]) -> Iterator[Window | None]:
    """The parts of a mask of (H, W) pixels that are looked at; None is all of it."""
    if size[0] * size[1] <= _WHOLE_PX:
        yield None
        return
    rows, columns = (np.linspace(0, side - min(side, _SIDE), 3).round().astype(int).tolist() for side in size)
    for top in rows:  # downwards: a compressed file is read once
        for left in columns:
            yield Window(top, left, min(size[0], _SIDE), min(size[1], _SIDE))


def _refuse_unmapped(
    mask: Path,
    labels: LabelMap,
    window: Window | None,
    counts: Counter[int],
    classes: Sequence[str],
    ignore: int,
) -> None:
    """Raise what reading would, and where values are as many as classes, the line that is perhaps wanted."""
    try:
        read_mask(mask, labels, window=window)
    except DataError as error:
        values = sorted(counts.keys() - {ignore})
        if labels.given or len(values) != len(classes) or not all(float(value).is_integer() for value in values):
            raise
        wanted = ", ".join(f"{value:g}: {name}" for value, name in zip(values, classes, strict=True))
        raise DataError(f"{error}; perhaps label_map: {{{wanted}}}") from error


def _spell(counts: Counter[int], labels: LabelMap) -> str:
    shown = [code for code, _ in counts.most_common(6)]
    return ", ".join(f"#{code:06X}" if labels.colours else f"{code:g}" for code in shown)
