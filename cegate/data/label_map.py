"""What the pixels of a mask mean: their values or colours, and the class that each stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cegate.config import IGNORE
from cegate.errors import ConfigError, nearest

_UNMAPPED = 254
_SHOWN = 6


@dataclass(frozen=True)
class LabelMap:
    """How the values or colours of a mask become class indices."""

    codes: tuple[tuple[int, int], ...]
    """Pairs of mask value (or 0xRRGGBB) and class index (255: ignored)."""
    colours: bool
    """The codes are colours."""
    given: bool = True
    """False: values are class indices, for nobody said otherwise."""

    @classmethod
    def parse(
        cls, mapping: Mapping[str | int, str | int] | None, classes: Sequence[str], ignore: int = IGNORE
    ) -> LabelMap:
        """Check a label map against the classes.

        Args:
            mapping: mask value or "#RRGGBB" (any case) -> class name, class index or "ignore". None: mask values are
                class indices.
            classes: class names in the order of their indices.
            ignore: a further mask value that is ignored; no meaning for colours.

        Raises:
            ConfigError: a key or value means nothing, or values and colours are mixed; all problems at once.
        """
        if mapping is None:
            table = {index: index for index in range(len(classes))}
            return cls(tuple(({ignore: IGNORE} | table | {ignore: IGNORE}).items()), colours=False, given=False)
        problems: list[str] = []
        table = {}
        keys = [str(key).strip() for key in mapping]
        colours = any(key.startswith("#") for key in keys)
        for key, meaning in zip(keys, mapping.values(), strict=True):
            code = _code(key, colours)
            index = _class_index(str(meaning), classes)
            if code is None:
                accepted = "'#RRGGBB' in a map of colours" if colours else "an integer or '#RRGGBB'"
                problems.append(f"key {key!r} is not {accepted}")
            elif index is None:
                problems.append(f"{key!r}: {meaning!r} is no class{nearest(str(meaning), [*classes, 'ignore'])}")
            elif code in table:
                problems.append(f"{key!r} is given twice")
            else:
                table[code] = index
        if problems:
            names = ", ".join(classes) or "none given"
            raise ConfigError(f"label_map: {'; '.join(problems)}; use a class ({names}), its index or 'ignore'")
        if not colours:
            table.setdefault(ignore, IGNORE)
        return cls(tuple(table.items()), colours)

    def apply(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class indices uint8 of mask codes of any shape, and True where a code is outside the map."""
        if codes.dtype == np.uint8:
            lut = np.full(256, _UNMAPPED, np.uint8)
            for code, index in self.codes:
                if 0 <= code < 256:
                    lut[code] = index
            label = lut[codes]
        else:
            label = np.full(codes.shape, _UNMAPPED, np.uint8)
            for code, index in self.codes:
                label[codes == code] = index
        return label, label == _UNMAPPED

    def describe(self) -> str:
        """The codes it knows, for messages."""
        return ", ".join(_spell(code, self.colours) for code, _ in self.codes)


def _code(key: str, colours: bool) -> int | None:
    if colours:
        digits = key.removeprefix("#")
        valid = key.startswith("#") and len(digits) == 6 and all(c in "0123456789abcdefABCDEF" for c in digits)
        return int(digits, 16) if valid else None
    try:
        return int(key)
    except ValueError:
        return None


def _class_index(meaning: str, classes: Sequence[str]) -> int | None:
    if meaning in classes:
        return list(classes).index(meaning)
    if meaning == "ignore":
        return IGNORE
    return int(meaning) if meaning.isdecimal() and int(meaning) < len(classes) else None


def _spell(code: float, colours: bool) -> str:
    return f"#{int(code):06X}" if colours else f"{code:g}"


def unmapped_message(path: str | Path, codes: np.ndarray, labels: LabelMap) -> str:
    values, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = ", ".join(f"{_spell(values[k], labels.colours)} ({counts[k]} px)" for k in order[:_SHOWN])
    more = f" and {len(order) - _SHOWN} more" if len(order) > _SHOWN else ""
    kind = "colours" if labels.colours else "values"
    advice = "add them to label_map, as a class or as 'ignore'"
    if not labels.colours and not (values == np.rint(values)).all():
        advice = "a label_map takes integers: write the masks anew, with an integer that is ignored where there is none"
    return f"{path}: mask {kind} outside the label map: {shown}{more}; known are {labels.describe()}; {advice}"
