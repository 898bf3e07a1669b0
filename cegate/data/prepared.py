"""The manifest of a prepared data set: what the folder holds, and what the values in its labels mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cegate.errors import DataError

FILE = "cegate_dataset.json"
FORMAT = 1
IMAGES, LABELS, SECOND = "img_dir", "ann_dir", "dsm_dir"


@dataclass(frozen=True)
class Counts:
    """Numbers of a split, None where none is published for the options in use."""

    images: int | None
    """Images as downloaded."""
    files: int | None
    """Images as prepared: crops, where images are cut."""


@dataclass(frozen=True)
class Split:
    """A part of a prepared set."""

    found: Counts
    expected: Counts
    bands: tuple[str, ...]
    """What the bands of the images are."""

    @property
    def complete(self) -> bool:
        """Found is what was expected."""
        return self.expected.images in (None, self.found.images) and self.expected.files in (None, self.found.files)


@dataclass(frozen=True)
class Source:
    """A downloaded image with its label: names and bytes."""

    split: str
    name: str
    image: str
    image_bytes: int
    label: str
    label_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything that a prepared folder says about itself."""

    name: str
    """Name of the published set."""
    classes: tuple[str, ...]
    palette: tuple[str, ...]
    """One "#RRGGBB" per class."""
    label_map: Mapping[str, str]
    """Value in the labels -> class name or "ignore"."""
    options: Mapping[str, str | int]
    """What the set was prepared with."""
    splits: Mapping[str, Split]
    sources: tuple[Source, ...] = field(repr=False)
    finished: bool = True
    """False while files are being written."""

    @property
    def partial(self) -> bool:
        """The splits are not those that were published."""
        return not all(split.complete for split in self.splits.values())


def read_manifest(folder: str | Path) -> Manifest:
    """Read what a prepared folder holds.

    Raises:
        DataError: no manifest, a damaged one, or one of another format version.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise DataError(
            f"{folder} has no {FILE}, so it is no prepared data set; make one from a download with "
            f"cegate data prepare NAME --root DOWNLOADED --out {folder} (cegate data list shows the names)"
        )
    try:
        stored = json.loads(path.read_text())
        version = stored.pop("format")
        if version == FORMAT:
            return _from_json(stored)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); prepare the set again into an empty folder") from error
    raise DataError(
        f"{path} is of format version {version}, but this cegate reads version {FORMAT}; "
        "prepare the set again into an empty folder"
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest aside, then put it in place; the same manifest gives the same bytes."""
    head = {
        "format": FORMAT,
        "name": manifest.name,
        "finished": manifest.finished,
        "partial": manifest.partial,
        "classes": list(manifest.classes),
        "palette": list(manifest.palette),
        "label_map": dict(manifest.label_map),
        "options": dict(manifest.options),
        "splits": {
            name: {"found": vars(split.found), "expected": vars(split.expected), "bands": list(split.bands)}
            for name, split in manifest.splits.items()
        },
    }
    lines = ",\n".join(json.dumps(list(vars(source).values()), ensure_ascii=False) for source in manifest.sources)
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    aside = folder / f".{FILE}.part"
    aside.write_text(f'{text},\n "sources": [\n{lines}\n ]\n}}\n')
    aside.replace(folder / FILE)


def _from_json(stored: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(Counts(**split["found"]), Counts(**split["expected"]), tuple(split["bands"]))
        for name, split in stored["splits"].items()
    }
    return Manifest(
        name=stored["name"],
        classes=tuple(stored["classes"]),
        palette=tuple(stored["palette"]),
        label_map=stored["label_map"],
        options=stored["options"],
        splits=splits,
        sources=tuple(Source(*source) for source in stored["sources"]),
        finished=stored["finished"],
    )
