"""Opens the set that a configuration names: any folder, LoveDA as downloaded, a prepared set, generated scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cegate.config import SecondConfig, SetConfig
from cegate.consistency import is_list
from cegate.data import climates, prepared
from cegate.data.label_map import LabelMap
from cegate.data.pairs import find_pairs, is_vector, read_names
from cegate.data.published.catalogue import find_published
from cegate.data.scale import ValueRange
from cegate.data.sets import FileSet, GeneratedSet, SegmentationSet, Unlabelled
from cegate.data.vector import ShapeLabels
from cegate.errors import ConfigError, DataError, nearest

LOVEDA_SPLITS: tuple[str, ...] = ("Train/Urban", "Train/Rural", "Val/Urban", "Val/Rural")


def open_set(
    cfg: SetConfig,
    *,
    name: str,
    classes: Sequence[str] = (),
    labelled: bool = True,
    like: ValueRange | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> SegmentationSet:
    """Open a set of images and masks.

    Args:
        cfg: where it is and how to read it.
        name: its name in the configuration ("source", "validation" or the target's name), for messages.
        classes: class names in the order of their indices. Folders need them, the other kinds know their own.
        labelled: ``False`` opens the images alone: masks need not exist, are not looked for and are never read, and
            what the set says of its labels does not count.
        like: (low, high) of each band in the set that a model learns from; counts where `cfg` has no value_range.
        seed: decides what val_fraction holds out.
        held_out: open what val_fraction holds out, in place of what it leaves.

    Returns:
        The set; pairs are found and the first is looked at, pixels are read when asked for.

    Raises:
        ConfigError: a key of the set is missing or wrong.
        DataError: no pairs, files without a partner, an unfit first pair, a folder that is not what it should be, or
            pixels of another depth than `like` is for.
    """
    openers = {
        "folder": _open_folder,
        "loveda": _open_loveda,
        "prepared": _open_prepared,
        "generated": _open_generated,
    }
    if cfg.kind not in openers:
        raise ConfigError(
            f"set {name!r}: kind={cfg.kind!r} is none of {', '.join(openers)}{nearest(cfg.kind, openers)}"
        )
    if cfg.bands is not None and (not cfg.bands or min(cfg.bands) < 1):
        raise ConfigError(f"set {name!r}: bands={cfg.bands} is not a list of band numbers, which start at 1")
    if cfg.limit is not None and cfg.limit < 1:
        raise ConfigError(f"set {name!r}: limit={cfg.limit} leaves nothing; use 1 or more, or no limit")
    if len(classes) >= 254 or len(set(classes)) != len(classes):
        raise ConfigError(f"data.classes has {len(classes)} names; use at most 253, each once")
    opened = openers[cfg.kind](cfg, name, classes, labelled)
    opened.fit = cfg.fit
    if cfg.val_fraction is not None and isinstance(opened, FileSet):
        opened.divide(cfg.val_fraction, seed, held=held_out)
    if cfg.second is not None and isinstance(opened, FileSet):
        opened.add_second(cfg.second, _root(cfg, name), _second_pattern(cfg))
    opened.choose_range(cfg.value_range, like)
    return opened if labelled else Unlabelled(opened)


def _labels(
    cfg: SetConfig, name: str, classes: Sequence[str], default: dict[str, str] | None, labelled: bool
) -> LabelMap:
    if not labelled:
        return LabelMap((), colours=False)
    mapping = default if cfg.label_map is None else cfg.label_map
    try:
        return LabelMap.parse(mapping, classes, cfg.ignore)
    except ConfigError as error:
        hint = "; data.classes has other classes than the set: give a label_map" if cfg.label_map is None else ""
        raise ConfigError(f"set {name!r}: {error}{hint}") from error


def _open_folder(cfg: SetConfig, name: str, classes: Sequence[str], labelled: bool) -> SegmentationSet:
    if labelled and not classes:
        raise ConfigError(f"set {name!r}: a folder needs data.classes, the class names in the order of their indices")
    shapes = None
    if labelled and is_vector(cfg.masks):
        shapes = _shape_labels(cfg, name, classes)
        labels = LabelMap.parse(None, classes)  # burned as class indices
    elif cfg.attribute is not None and labelled:
        raise ConfigError(f"set {name!r}: attribute={cfg.attribute} is for masks in .gpkg, .geojson or .shp files")
    else:
        labels = _labels(cfg, name, classes, default=None, labelled=labelled)
    only = read_names(_list_file(_root(cfg, name), cfg.split)) if is_list(cfg.split) else None
    pairs = find_pairs(_root(cfg, name), cfg.images, cfg.masks if labelled else None, name, only)
    return FileSet(cfg, name, classes, labels, pairs[: cfg.limit], shapes)


def _shape_labels(cfg: SetConfig, name: str, classes: Sequence[str]) -> ShapeLabels:
    try:
        return ShapeLabels(cfg.attribute, cfg.label_map, classes)
    except ConfigError as error:
        raise ConfigError(f"set {name!r}: {error}") from error


def _list_file(root: Path, split: str) -> Path:
    """Below the root of the set, else as it stands."""
    below = root / Path(split).expanduser()
    return below if below.is_file() else Path(split).expanduser()


def _open_loveda(cfg: SetConfig, name: str, classes: Sequence[str], labelled: bool) -> SegmentationSet:
    if cfg.split not in LOVEDA_SPLITS:
        hint = nearest(cfg.split or "", LOVEDA_SPLITS)
        raise ConfigError(f"set {name!r}: split={cfg.split!r} is none of {', '.join(LOVEDA_SPLITS)}{hint}")
    loveda = find_published("loveda")
    classes = classes or loveda.classes
    stored = {str(value): meaning for value, meaning in loveda.stored.items()}
    labels = _labels(cfg, name, classes, default=stored, labelled=labelled)
    masks = f"{cfg.split}/masks_png/*.png" if labelled else None
    root = _root(cfg, name)
    if not (root / cfg.split / "images_png").is_dir():
        raise DataError(
            f"set {name!r}: {root} has no {cfg.split}/images_png; LoveDA comes from {loveda.origin}, "
            f"unpacked it is {loveda.layout}"
        )
    pairs = find_pairs(root, f"{cfg.split}/images_png/*.png", masks, name)
    opened = FileSet(cfg, name, classes, labels, pairs[: cfg.limit])
    opened.palette = _palette(classes, loveda.classes, loveda.palette)
    return opened


def _palette(classes: Sequence[str], known: Sequence[str], colours: Sequence[str]) -> tuple[str, ...]:
    """The colours of classes in their order; nothing if one has none."""
    table = dict(zip(known, colours, strict=True))
    return tuple(table[name] for name in classes) if set(classes) <= table.keys() else ()


def _open_prepared(cfg: SetConfig, name: str, classes: Sequence[str], labelled: bool) -> SegmentationSet:
    root = _root(cfg, name)
    try:
        manifest = prepared.read_manifest(root)
    except DataError as error:
        raise DataError(f"set {name!r}: {error}") from error
    if not manifest.finished:
        raise DataError(f"set {name!r}: preparing {root} was interrupted; run cegate data prepare again, it goes on")
    held = [split for split, part in manifest.splits.items() if part.found.files]
    if cfg.split not in held:
        hint = nearest(cfg.split or "", held)
        raise ConfigError(f"set {name!r}: split={cfg.split!r} is none of {', '.join(held)}, which {root} holds{hint}")
    classes = classes or manifest.classes
    labels = _labels(cfg, name, classes, default=dict(manifest.label_map), labelled=labelled)
    masks = f"{prepared.LABELS}/{cfg.split}/*" if labelled else None
    pairs = find_pairs(root, f"{prepared.IMAGES}/{cfg.split}/*", masks, name)
    expected = manifest.splits[cfg.split].found.files
    if len(pairs) != expected:
        raise DataError(
            f"set {name!r}: {root / prepared.IMAGES / cfg.split} holds {len(pairs)} images, but {expected} were "
            f"prepared; cegate data check {root} tells more"
        )
    opened = FileSet(cfg, name, classes, labels, pairs[: cfg.limit])
    opened.palette = _palette(classes, manifest.classes, manifest.palette)
    return opened


def _open_generated(cfg: SetConfig, name: str, classes: Sequence[str], labelled: bool) -> SegmentationSet:
    if cfg.split not in climates.CLIMATES:
        hint = nearest(cfg.split or "", climates.CLIMATES)
        raise ConfigError(
            f"set {name!r}: split={cfg.split!r} is no climate; use one of {', '.join(climates.CLIMATES)}{hint}"
        )
    if (cfg.tile is not None and cfg.tile < 16) or cfg.first < 0:
        raise ConfigError(
            f"set {name!r}: tile={cfg.tile}, first={cfg.first}: use a tile of 16 or more and a first of 0 or more"
        )
    classes = classes or climates.CLASSES
    drawn = {str(k): class_name for k, class_name in enumerate(climates.CLASSES)}
    labels = _labels(cfg, name, classes, default=drawn, labelled=labelled)
    missing = [drawn[key] for key in drawn if int(key) not in dict(labels.codes)]
    if labelled and (missing or labels.colours):
        raise ConfigError(
            f"set {name!r}: label_map of generated scenes needs the keys {', '.join(drawn)}, "
            f"which are {', '.join(climates.CLASSES)}"
        )
    return GeneratedSet(cfg, name, classes, labels)


def _second_pattern(cfg: SetConfig) -> str:
    """Its glob; a prepared set has a folder of its own for it."""
    is_default = cfg.second.images == SecondConfig().images
    return f"{prepared.SECOND}/{cfg.split}/*" if is_default and cfg.kind == "prepared" else cfg.second.images


def _root(cfg: SetConfig, name: str) -> Path:
    if cfg.root is None:
        raise ConfigError(f"set {name!r}: root is missing; give the folder that holds the set")
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise DataError(f"set {name!r}: root {root} is not a folder; give the folder that holds the set")
    return root
