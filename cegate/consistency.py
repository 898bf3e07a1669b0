"""How the values of a configuration fit together; what one value may be is in `cegate.config`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from cegate.config import SOURCE_DOMAIN, Config, SetConfig
from cegate.errors import ConfigError, nearest, quoted, shown
from cegate.methods import METHODS, OF_TWO_RASTERS
from cegate.sites import SiteId


def find_problems(config: Config, *, training: bool = False) -> list[str]:
    """Every value that is accepted by itself and does not fit the others, one line each.

    Args:
        config: what was read.
        training: also ask for a source set with classes.
    """
    return [
        *_run_problems(config),
        *_data_problems(config, training),
        *_model_problems(config, training),
        *_gate_problems(config, training),
        *_adapt_problems(config, training),
        *_train_problems(config),
    ]


def _run_problems(config: Config) -> Iterator[str]:
    for key, value in METHODS.get(config.run.method, {}).items():
        found = functools.reduce(getattr, key.split("."), config)
        if found != value:
            yield (
                f"run.method={config.run.method} means {key}={shown(value)}, but it is {shown(found)}; "
                "leave out one of the two"
            )


def _data_problems(config: Config, training: bool) -> Iterator[str]:
    data = config.data
    for key, stride in (("data.stride", data.stride), ("evaluate.stride", config.evaluate.stride)):
        if stride is not None and stride > data.crop:
            yield f"{key}={stride} leaves gaps between windows of data.crop={data.crop}; use at most the crop"
    needed = training and data.source.kind == "folder"  # the other kinds bring their classes along
    if data.classes or needed:
        yield from _class_problems(data.classes, data.palette)
    for name in config.evaluate.mean_classes:
        if data.classes and name not in data.classes:
            yield f"evaluate.mean_classes: {quoted(name)} is no class{nearest(name, data.classes)}"
    for name in data.targets:
        if not re.fullmatch(r"[\w.\-]{1,80}", name) or name in (SOURCE_DOMAIN, ".", ".."):
            yield (
                f"data.targets.{shown(name)}: {quoted(name)} cannot name a target; use letters, digits, '_', '-' and "
                "not 'source'"
            )
    if data.validation is not None and data.validation.val_fraction != data.source.val_fraction:
        yield "data.source.val_fraction and data.validation exclude each other; give one"
    for key, item in sets_of(config):
        if training or key != "data.source":
            yield from _set_problems(item, key, data.classes, training)


def sets_of(config: Config) -> Iterator[tuple[str, SetConfig]]:
    data = config.data
    named = {"source": data.source, **{f"targets.{name}": item for name, item in data.targets.items()}}
    named |= {"validation": data.validation, "unlabelled": data.unlabelled}
    yield from ((f"data.{name}", item) for name, item in named.items() if item is not None)


def _class_problems(classes: Sequence[str], palette: Sequence[str]) -> Iterator[str]:
    if not 2 <= len(classes) <= 255:
        yield f"data.classes has {len(classes)} names; give 2 to 255 class names in the order of their indices"
    if twice := sorted({name for name in classes if list(classes).count(name) > 1}):
        yield f"data.classes names {shown(twice)[1:-1]} more than once"
    if not all(map(str.strip, classes)):
        yield "data.classes has an empty name; give every class one"
    if palette and len(palette) != len(classes):
        yield f"data.palette has {len(palette)} colours for {len(classes)} classes; give one per class or none"


def _set_problems(item: SetConfig, prefix: str, classes: Sequence[str], training: bool) -> Iterator[str]:
    if item.kind != "generated" and not item.root:
        yield f"{prefix}.root is missing; a set of kind {item.kind} needs the folder that holds it"
    if unknown := re.search(r"\$\{([^}]*)\}", item.root or ""):
        yield f"{prefix}.root names {shown(unknown[0])}; give --data.roots.{shown(unknown[1])} the folder that holds it"
    if item.kind != "folder" and not item.split:
        yield f"{prefix}.split is missing; a set of kind {item.kind} needs it"
    if training and item.kind == "folder" and item.split and not is_list(item.split):  # runs that ignored it are read
        yield f"{prefix}.split={shown(item.split)} is no text file; a folder takes a .txt with one name a line"
    if item.val_fraction is not None and item.kind == "generated":
        yield f"{prefix}.val_fraction: scenes are drawn; give data.validation another first in place of it"
    if item.val_fraction is not None and prefix not in ("data.source", "data.validation"):
        yield f"{prefix}.val_fraction counts in data.source alone; leave it out"
    if item.second is not None and (item.second.scale == "fixed") != (item.second.value_range is not None):
        yield f"{prefix}.second: scale=fixed and value_range go together; give both or none"
    for value, meaning in (item.label_map or {}).items():
        name = str(meaning)
        known = name in classes or name == "ignore" or (name.isdecimal() and int(name) < max(len(classes), 1))
        if classes and not known:
            yield f"{prefix}.label_map.{shown(value)}={quoted(name)} is no class{nearest(name, [*classes, 'ignore'])}"


def _model_problems(config: Config, training: bool) -> Iterator[str]:
    injector = config.injector
    if injector.width % injector.heads:
        yield f"injector.width={injector.width} is no multiple of injector.heads={injector.heads}; change one of them"
    for key, section in (("style", config.style), ("mim", config.mim)):
        if section.method != "none" and section.block > config.data.crop:
            yield f"{key}.block={section.block} is larger than data.crop={config.data.crop}; use at most the crop"
    second = config.data.source.second
    if second is not None:
        alone = [f"{key}.method" for key in ("style", "mim", "injector") if getattr(config, key).method != "none"]
        if alone:
            yield f"data.source.second does not go with {', '.join(alone)}, which know one raster; leave out either"
        if not config.modal.dropout and second.missing == "error":
            for key, item in sets_of(config):
                if item.second is not None and item.second.missing == "allow":
                    yield (
                        f"{key}.second.missing=allow needs a model that learns to do without: set modal.dropout above "
                        "0, or data.source.second.missing=allow"
                    )
    elif training and config.modal.dropout and not config.modal.single:
        yield f"modal.dropout={config.modal.dropout} needs data.source.second, the second raster of every image"
    if training and config.run.method in OF_TWO_RASTERS and config.data.source.second is None:
        yield f"run.method={config.run.method} needs data.source.second, the second raster of every image"


def _adapt_problems(config: Config, training: bool) -> Iterator[str]:
    adapt = config.adapt
    if not training:
        return
    if adapt.method == "none":
        if config.data.unlabelled is not None:
            yield "data.unlabelled is used by nothing; give adapt.method, such as dacs, or leave it out (null)"
        return
    if config.data.unlabelled is None:
        yield f"adapt.method={adapt.method} needs data.unlabelled, the images of the target domain"
    if adapt.warmup >= config.train.iterations:
        yield (
            f"adapt.warmup={adapt.warmup} leaves {adapt.method} nothing of train.iterations={config.train.iterations}; "
            "use fewer"
        )


def _gate_problems(config: Config, training: bool) -> Iterator[str]:
    gate = config.gate
    if gate.loss == "all" and config.mim.method == "none":
        yield "gate.loss=all adds the restoration of masked images, but mim.method is none; use task, or set mim.method"
    if gate.loss == "all" and config.injector.method != "none" and config.injector.at == "blocks":
        yield "gate.loss=all needs injector.at=outputs: at blocks masked images take a pass of their own"
    if gate.loss == "all" and config.data.source.second is not None:
        yield "gate.loss=all takes images without a second raster; use gate.loss=task"
    if gate.method == "fixed" and not gate.sites:
        yield "gate.sites is empty; gate.method 'fixed' needs sites such as [spatial.7, semantic.0]"
    if training and gate.method != "fixed" and gate.sites:  # runs that ignored them can still be read
        yield f"gate.sites counts with gate.method=fixed alone, it is {gate.method}; leave them out, or give them as []"
    for text in gate.sites:
        try:
            kind = SiteId.parse(text).kind
        except ConfigError as error:
            yield f"gate.sites: {error}"
        else:
            if kind not in config.toolbox.kinds:
                yield f"gate.sites: {text!r} is of no kind in toolbox.kinds={shown(config.toolbox.kinds)}"


def _train_problems(config: Config) -> Iterator[str]:
    train = config.train
    if train.warmup >= train.iterations:
        yield f"train.warmup={train.warmup} leaves nothing of train.iterations={train.iterations}; use fewer"
    if train.horizon is not None and train.horizon < train.iterations:
        yield (
            f"train.horizon={train.horizon} ends the schedule before train.iterations={train.iterations}; "
            "use as many or more"
        )
    if (train.schedule == "steps") != bool(train.milestones):
        yield "train.schedule=steps and train.milestones go together; give both or none"
    if train.loss.name != "ce" and config.model.head == "mask2former":
        yield (
            f"train.loss.name={train.loss.name}: model.head=mask2former brings its own loss; leave it out "
            "(class_weights it takes), or use another head"
        )
    weights, classes = train.loss.class_weights, config.data.classes
    if weights is not None and classes and len(weights) != len(classes):
        yield f"train.loss.class_weights has {len(weights)} numbers for {len(classes)} classes; give one per class"


def find_doubts(config: Config) -> Iterator[str]:
    """Values that are right and still may not be meant, one line each."""
    classes = config.data.classes
    for key, item in sets_of(config):
        if item.label_map is None and 0 <= item.ignore < len(classes):
            yield (
                f"{key}.ignore={item.ignore} hides class {item.ignore} ({classes[item.ignore]}): it is neither trained "
                "nor counted there"
            )


def is_list(split: str | None) -> bool:
    """Whether the split of a set is a text file of names."""
    return split is not None and split.lower().endswith(".txt")
