"""What a survey found, in lines for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cegate.data.layout import Part
from cegate.data.survey import Images, Labels, Survey, counted


def lines_of(found: Survey) -> list[tuple[str, str]]:
    """(what, facts) of a folder, to be shown one below the other."""
    part, images, labels = found.part, found.images, found.labels
    rows = [("pairs", f"{len(part.pairs)}: {part.images} with {part.masks}{_folders(part)}")]
    if found.validation is not None:
        rows.append(("validation", f"{len(found.validation.pairs)} pairs: {found.validation.images}"))
    if found.test is not None:
        rows.append(("test", f"{len(found.test.pairs)} pairs: {found.test.images}"))
    named = ", ".join(_band_names(images))
    bands = f"{len(images.names)} band{'s' * (len(images.names) != 1)}{f' ({named})' if named else ''}"
    rows.append(("images", f"{bands}, {counted(images.dtypes)}, {_sizes(images)}"))
    rows.append(("values", f"{_ranges(images)} (1 % to 99 %){_tags(images.nodata)}"))
    rows.append(("place", _place(images)))
    rows.append(("labels", _shares(labels)))
    if found.division is not None:
        rows.append(("hold-out", f"{len(found.division.held)} of {_total(found)} images {found.division.how}"))
    rows += [("odd", line) for line in found.odd]
    also = [f"{other.images} with {other.masks} ({len(other.pairs)})" for other in found.others[:3]]
    if also:
        more = f" and {len(found.others) - 3} more" if len(found.others) > 3 else ""
        rows.append(("also there", "; ".join(also) + more))
    return rows


def _band_names(images: Images) -> list[str]:
    """Those worth showing."""
    names = [name for name in images.names if name]
    return [name if len(name) < 24 else f"{name[:23]}…" for name in names] if len(set(names)) == len(names) else []


def _total(found: Survey) -> int:
    return len(found.part.pairs) if found.usable is None else len(found.usable)


def _folders(part: Part) -> str:
    counts = Counter(name.rpartition("/")[0] for name, *_ in part.pairs)
    if len(counts) < 2:
        return ""
    shown = ", ".join(f"{folder or '.'} {count}" for folder, count in list(counts.items())[:6])
    return f", {len(counts)} folders ({shown}{', …' if len(counts) > 6 else ''})"


def _sizes(images: Images) -> str:
    (h, w), (height, width) = images.smallest, images.largest
    return f"{w}x{h} px" if images.smallest == images.largest else f"{w}x{h} to {width}x{height} px"


def _ranges(images: Images) -> str:
    shown = [f"{low:.4g}..{high:.4g}" for low, high in images.ranges[:4]]
    return ", ".join(shown) + (f" and {len(images.ranges) - 4} more bands" if len(images.ranges) > 4 else "")


def _tags(nodata: Iterable[float]) -> str:
    tags = ", ".join(f"{tag:g}" for tag in nodata)
    return f"; nodata {tags}" if tags else ""


def _place(images: Images) -> str:
    if not images.systems:
        return "images do not say where they lie"
    low, high = images.pixel_sizes
    sizes = f"{low:.4g}" if high < 1.01 * low else f"{low:.4g} to {high:.4g}"
    unit = {"metre": " m", "degree": "°"}.get(images.units[0], f" {images.units[0]}") if len(images.units) == 1 else ""
    return f"{counted(images.systems)}, pixels of {sizes}{unit.rstrip()}"


def _shares(labels: Labels) -> str:
    if labels.problem:
        return labels.problem
    if isinstance(next(iter(labels.shares)), str) and not labels.colours:
        held = (
            f"{labels.attribute}: {', '.join(labels.shares)}" if labels.attribute else "no attribute looks like a class"
        )
        return f"shapes; {held}"
    shown = [f"{value} {percent(share)}" for value, share in list(labels.shares.items())[:12]]
    more = f" and {len(labels.shares) - 12} more" if len(labels.shares) > 12 else ""
    seen = "all masks" if labels.looked_at == labels.masks else f"{labels.looked_at} of {labels.masks} masks"
    return f"{', '.join(shown)}{more} (in {seen})"


def percent(share: float) -> str:
    """A share in percent, with a digit more where it is small."""
    return f"{100 * share:.1f} %" if share >= 1e-3 or not share else f"{100 * share:.2g} %"
