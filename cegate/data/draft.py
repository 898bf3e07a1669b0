"""A configuration for a folder, as a short commented text that trains as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cegate.data.layout import Part
from cegate.data.survey import FRACTION, Images, Meaning, Survey, bands_of, meaning_of
from cegate.data.survey_lines import percent

_CROP, _STEP, _LARGE_PX = 256, 16, 1024


def draft(found: Survey, out: Path) -> tuple[str, dict[Path, str]]:
    """Write a configuration in words.

    Args:
        found: what lies in the folder.
        out: the file that it is meant for; the run is called after it.

    Returns:
        The text of the file, and lists of names to be written beside it: path -> text.

    Raises:
        DataError: the masks cannot be read as labels.
    """
    meaning, root = meaning_of(found.labels), found.root.resolve()
    lists: dict[Path, str] = {}

    def described(part: Part, stage: str, names: tuple[str, ...] | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"root": str(root), "images": part.images, "masks": part.masks}
        if names is None and not part.is_exact:
            names = tuple(image.as_posix() for _, image, _ in part.pairs)
        if names is not None:
            listed = out.resolve().with_name(f"{out.stem}{stage}.txt")
            lists[listed] = "".join(f"{name}\n" for name in names)
            entry["split"] = str(listed)
        bands, _ = bands_of(found.images)
        more = {
            "attribute": found.labels.attribute,
            "label_map": meaning.label_map,
            "bands": bands,
            "nan": "ignore" if any(dtype.startswith("float") for dtype in found.images.dtypes) else None,
        }
        return entry | {key: value for key, value in more.items() if value is not None}

    source = described(found.part, "", found.usable)
    validation = found.validation and described(found.validation, "_val", None)
    test = found.test and described(found.test, "_test", None)
    text = "\n".join(_lines(found, meaning, out, source, validation, test))
    return f"{text}\n", lists


def assumptions(found: Survey) -> list[str]:
    """What the draft takes for granted, a line each."""
    meaning, (_, why) = meaning_of(found.labels), bands_of(found.images)
    named = "give the classes their names in data.classes" if found.labels.attribute is None else ""
    lines = ["; ".join(filter(None, (meaning.why, named)))]
    if why:
        lines.append(f"bands: {why}")
    if found.validation is None and found.division is None:
        lines.append("nothing is held out, so the last model counts; give data.validation images of its own")
    return lines


def _lines(
    found: Survey,
    meaning: Meaning,
    out: Path,
    source: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    test: Mapping[str, Any] | None,
) -> Iterator[str]:
    total = len(found.part.pairs) if found.usable is None else len(found.usable)
    pairs = f"{total} pair{'s' * (total != 1)}"
    yield f"# {pairs} of images and masks, as cegate init found them. Every line may be changed; a key"
    yield "# that is left out has its default, and cegate train --help tells what each means."
    yield f"run: {{name: {_flow(_run_name(out))}}}"
    yield "data:"
    yield f"  classes: {_flow(list(meaning.classes))}  # {meaning.why}"
    if meaning.palette:
        yield f"  palette: {_flow(list(meaning.palette))}"
    yield "  source:  # trained on"
    yield from _set(source, found, "    ")
    if validation is not None:
        yield "  validation:  # never trained on; the best model is the one that is best here"
        yield from _set(validation, found, "    ", told=True)
    elif found.division is not None:
        yield f"    val_fraction: {FRACTION}  # held out {found.division.how}; the model that is best there counts"
    if test is not None:
        yield "  targets:  # only tested on"
        yield "    test:"
        yield from _set(test, found, "      ", told=True)
    else:
        yield "  # targets:  # other places, only tested on"
        yield '  #   elsewhere: {root: /path/to/it, images: "images/*", masks: "masks/*"}'
    crop = _crop(found.images)
    yield f"  crop: {crop}  # pixels, of images of {_size(found.images)}"
    yield "  batch_size: 4"
    yield "# A first look that a CPU manages in minutes: a small backbone that ships with cegate."
    yield "model: {backbone: tiny}"
    yield "toolbox: {spatial: {rank: 8}, semantic: {width: 16}, frequency: {width: 8}}"
    yield "gate: {k: 8, interval: 100}"
    yield "train: {iterations: 500, lr: 1e-3, eval_every: 250, log_every: 20}"
    yield "# baseline: true in train first trains a head alone on the frozen backbone, to compare with."
    if found.validation is not None or found.division is not None:
        yield f"# The rate matters more than the method: cegate tune-lr --config {out} finds one for your data."
    yield "# For numbers that count, with a GPU: take the lines above out and these in (downloads 1.2 GB once)."
    yield "# model: {backbone: vit_large_patch14_dinov2, patch_size: 16, features: [7, 11, 15, 23], head: mask2former}"
    yield "# train: {iterations: 20000, lr: 1e-4, eval_every: 2000}"


def _set(entry: Mapping[str, Any], found: Survey, indent: str, *, told: bool = False) -> Iterator[str]:
    _, why = bands_of(found.images)
    remarks = {
        "split": "names of the pairs that can be used",
        "label_map": "value in the masks: class, by its place in classes from 0 on",
        "bands": why,
        "nan": "pixels that are NaN are neither trained on nor counted",
        "attribute": "what of each shape is its class",
    }
    if found.labels.attribute is not None:
        remarks["label_map"] = "value of the attribute: class; '' is what no shape covers"
    for key, value in entry.items():
        remark = None if told else remarks.get(key)
        yield f"{indent}{key}: {_flow(value)}{f'  # {remark}' if remark else ''}"
        if key == "label_map" and not told and not found.labels.attribute:
            shares = [f"{code} {percent(share)}" for code, share in list(found.labels.shares.items())[:16]]
            yield f"{indent}# shares: {', '.join(shares)}"


def _run_name(out: Path) -> str:
    name = re.sub(r"[^\w.\-]", "_", out.stem)[:80]
    return name if name.strip(".") else "run"


def _crop(images: Images) -> int:
    side = min(*images.smallest, *images.largest)
    return max(_STEP, min(_CROP, side // _STEP * _STEP))


def _size(images: Images) -> str:
    (height, width), (h, w) = images.smallest, images.largest
    return f"{width}x{height}" if (h, w) == (height, width) else f"{width}x{height} to {w}x{h}"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_flow(key)}: {_flow(item)}' for key, item in value.items())}}}"
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]
