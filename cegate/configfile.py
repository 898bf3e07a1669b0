"""Configurations as files, mappings and option strings: strict reading, checking and writing. No torch here.

Every way in (YAML file, mapping, command line) goes through `read_config`, so that a `Config` read is a valid one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import logging
import math
import re
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from cegate.config import KINDS, Config, SetConfig
from cegate.errors import ConfigError, nearest
from cegate.methods import METHODS

log = logging.getLogger(__name__)

SECTIONS: dict[str, type] = typing.get_type_hints(Config)
SOURCE_DOMAIN = "source"

# the string under a field is its help
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def read_config(
    source: Mapping[str, Any] | str | Path, overrides: Sequence[tuple[str, str]] = (), *, training: bool = False
) -> Config:
    """Read a configuration strictly.

    Args:
        source: a mapping with the sections of `Config`, a YAML file, or the name of a shipped configuration.
        overrides: (dotted key, YAML text) pairs that replace what the source says, in order.
        training: also ask for what only a training run needs (a source set).

    Raises:
        ConfigError: unreadable file, unknown key or bad value; all are named at once, with the nearest valid one.
    """
    if isinstance(source, Mapping):
        mapping, where = _without_empty(Config, source, ""), ""
    else:
        path = find_config(source)
        mapping, where = read_mapping(path), f"{path}: "
    before, problems = _build(Config, mapping, "")
    _refuse(where, problems)
    for key, value in METHODS.get(before.run.method, {}).items():
        if _get(mapping, key) is None:
            mapping = _replaced(mapping, key.split("."), value)
    for key, text in overrides:
        method = _get(_replaced({}, key.split("."), _Text(text)), "run.method")
        for decided, value in METHODS.get(str(method), {}).items():  # in place of what the file's method had decided
            mapping = _replaced(mapping, decided.split("."), value)
    for key, text in overrides:
        mapping = _replaced(mapping, key.split("."), _Text(text))
    config, problems = _build(Config, mapping, "")
    _refuse("", problems or list(_idle_roots(config, before, overrides, training)))
    config = _with_roots(config)
    _refuse("", find_problems(config, training=training))
    return config


def _idle_roots(config: Config, before: Config, overrides: Sequence[tuple[str, str]], training: bool) -> Iterator[str]:
    """Roots given in vain: the sets of a run's config.yaml hold folders, not names of roots.

    Args:
        config: with the overrides, its roots unresolved.
        before: what the source says.
        overrides: (dotted key, text) pairs.
        training: one list of roots may serve several settings, so that a name that no set uses is no mistake.
    """
    data = config.data
    sets = {"source": data.source, "validation": data.validation, "unlabelled": data.unlabelled}
    sets |= {f"targets.{name}": target for name, target in data.targets.items()}
    roots = {f"--data.{name}.root": item.root for name, item in sets.items() if item and item.root}
    for key, text in overrides:
        name, old = key.removeprefix("data.roots."), before.data.roots.get(key.removeprefix("data.roots."))
        used = name == key or any(f"${{{name}}}" in root for root in roots.values())
        below = [option for option, root in roots.items() if old and root.startswith(old)]
        if not used and old != text and (below or (roots and not training)):
            yield (
                f"{key}={text} changes nothing, for no set has a root with ${{{name}}} (those of a run are resolved); "
                f"give {', '.join(below or roots)} instead"
            )


def _with_roots(config: Config) -> Config:
    """Every ``${name}`` in the root of a set, as far as data.roots knows the name."""
    data = config.data

    def resolve(item: SetConfig | None) -> SetConfig | None:
        if item is None or item.root is None:
            return item
        known = re.sub(r"\$\{([\w\-]+)\}", lambda match: data.roots.get(match[1], match[0]), item.root)
        return dataclasses.replace(item, root=known)

    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            source=resolve(data.source),
            validation=resolve(data.validation),
            unlabelled=resolve(data.unlabelled),
            targets={name: resolve(target) for name, target in data.targets.items()},
        ),
    )


def _refuse(where: str, problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(where + "; ".join(problems))


def find_config(name: str | Path, folder: Path | None = None) -> Path:
    """Path of a configuration file, or of the shipped configuration of that name.

    Args:
        name: file or name.
        folder: what a relative file is relative to; default: the working directory.

    Raises:
        ConfigError: neither exists.
    """
    path = (folder or Path()) / name
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(name) in shipped:
        return shipped[str(name)]
    near = _near_configs(re.sub(r"\.ya?ml$", "", str(name)), list(shipped))
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if Path(name).suffix in (".yaml", ".yml"):
        raise ConfigError(f"config {str(name)!r}: no such file{'; ' + guess.strip() if near else ''}")
    raise ConfigError(
        f"config {str(name)!r} is no file and no shipped configuration; {guess}cegate bench --help lists all of them"
    )


def _near_configs(name: str, shipped: Sequence[str]) -> list[str]:
    """Up to three shipped names: those of other folders that end alike, else those spelt alike."""
    alike = [other for other in shipped if other.rpartition("/")[2] == name.rpartition("/")[2]]
    return alike[:3] or difflib.get_close_matches(name, shipped, n=3, cutoff=0.5)


def shipped_configs() -> dict[str, Path]:
    """Name (``quickstart``, ``dg/p_i2v``) -> path of the configurations that come with the package.

    Files and folders whose name starts with ``_`` are parts of others and have no name of their own.
    """
    folder = Path(str(resources.files("cegate") / "configs"))
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in names.items() if "/_" not in f"/{name}"}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, on top of what its key ``base`` names.

    ``base`` is a file, relative to this one, or the name of a shipped configuration, or a list of these; later ones win
    over earlier ones.

    Raises:
        ConfigError: a file is unreadable, no YAML, no mapping, or its own base; the line is named.
    """
    return _read_on_base(path, ())


def _read_on_base(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in readers:
        raise ConfigError(f"{path} is its own base; remove it from the key base")
    mapping = _read_yaml(path)
    bases = mapping.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            found = find_config(str(base), path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: base: {error}") from error
        merged = _merged(merged, _read_on_base(found, (*readers, path.resolve())))
    return _merged(merged, _without_empty(Config, mapping, ""))


def _without_empty(cls: type, mapping: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A nested mapping without its empty values (``lr:``) where null is none of the key's values: a key without a value
    is one left out, so that the base's or the default counts; said aloud."""
    hints = typing.get_type_hints(cls)
    kept: dict[str, Any] = {}
    for name, value in mapping.items():
        hint = hints.get(name)
        inner, named, _ = (None, False, False) if hint is None else _inner(hint)
        if value is None and hint is not None and inner is None and not _takes_null(hint):
            log.warning("%s%s is empty, as if it were left out", prefix, name)
        elif isinstance(value, Mapping) and inner is not None:
            below = (
                {
                    n: v if not isinstance(v, Mapping) else _without_empty(inner, v, f"{prefix}{name}.{n}.")
                    for n, v in value.items()
                }
                if named
                else _without_empty(inner, value, f"{prefix}{name}.")
            )
            kept[name] = below
        else:
            kept[name] = value
    return kept


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, where ``above`` wins."""
    both = {
        key: _merged(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)
    }
    return {**below, **above, **both}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} holds a {type(mapping).__name__}; a mapping with {', '.join(SECTIONS)} is expected")
    return mapping


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists of a configuration or one of its sections."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The configuration as YAML with every key in its documented order; `read_config` reads it back equal."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=120)


def changed_values(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> old and new value, None where one has no such key."""
    a, b = dict(_leaves(to_mapping(old))), dict(_leaves(to_mapping(new)))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- from nested mappings to dataclasses ----------------------------------------------------------------------------


class _Text(str):
    """A value as typed on the command line: YAML where that fits the key, else the text itself."""


def _get(mapping: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for name in key.split("."):
        mapping = _loaded(mapping)
        mapping = mapping.get(name) if isinstance(mapping, Mapping) else None
    return mapping


def _replaced(mapping: Any, parts: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a nested mapping with one dotted key replaced; a mapping typed as text before it keeps its others."""
    mapping = _loaded(mapping)
    mapping = dict(mapping) if isinstance(mapping, Mapping) else {}
    name, *rest = parts
    mapping[name] = _replaced(mapping.get(name), rest, value) if rest else value
    return mapping


def _build(cls: type, mapping: Any, key: str) -> tuple[Any, list[str]]:
    """A dataclass made of a nested mapping, and what is wrong with the mapping (then defaults stand in)."""
    mapping = _loaded(mapping)
    hints = typing.get_type_hints(cls)
    if not isinstance(mapping, Mapping | None):
        guess = f"; did you mean --{key}.root {mapping}?" if cls is SetConfig and isinstance(mapping, str) else ""
        return cls(), [f"{key}={mapping!s} is not accepted; expected a mapping of {', '.join(hints)}{guess}"]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in (mapping or {}).items():
        dotted = f"{key}.{name}" if key else str(name)
        if name in hints:
            values[name], found = _value(hints[name], value, dotted)
            problems += found
        else:
            guess = _colon_hint([name], [value]) or _suggest(str(name), key, hints)
            problems.append(f"unknown key {dotted!r}{guess}")
    return cls(**values), problems


def _value(hint: Any, value: Any, key: str) -> tuple[Any, list[str]]:
    inner, named, optional = _inner(hint)
    loaded = _loaded(value)
    if inner is None or (loaded is None and optional):
        return _leaf(hint, value, key)
    if not named:
        return _build(inner, loaded, key)
    if not isinstance(loaded, Mapping | None):
        return {}, [f"{key}={loaded!r} is not accepted; expected a mapping from names to sets"]
    built = {str(name): _build(inner, item, f"{key}.{name}") for name, item in (loaded or {}).items()}
    return {name: item for name, (item, _) in built.items()}, [text for _, found in built.values() for text in found]


def _leaf(hint: Any, value: Any, key: str) -> tuple[Any, list[str]]:
    """The value as its type, which jsonargparse judges."""
    for candidate in [_loaded(value), str(value)] if isinstance(value, _Text) else [value]:
        if candidate is None and not _takes_null(hint):  # jsonargparse lets it pass
            continue
        if isinstance(candidate, Mapping):  # YAML reads `0: road` with an integer key
            candidate = {str(n): str(item) if isinstance(item, _Text) else item for n, item in candidate.items()}
        try:
            return (_judged_once if isinstance(candidate, Hashable) else _judged)(hint, candidate), []
        except (argparse.ArgumentError, TypeError, ValueError):
            continue
    expected = f"expected {_describe(hint)}{nearest(str(value), list(_choices(hint)))}"
    loaded = _loaded(value)
    guess = _colon_hint(loaded, loaded.values()) if isinstance(loaded, Mapping) else ""
    if loaded is None:
        return None, [f"{key} is empty; {expected}"]
    return None, [f"{key}={value!s} is not accepted; {expected}{guess}"]


def _takes_null(hint: Any) -> bool:
    return hint is types.NoneType or (_is_union(hint) and types.NoneType in typing.get_args(hint))


def _colon_hint(names: Iterable[Any], values: Iterable[Any]) -> str:
    """What to do about ``{0:road}``, which YAML reads as the name ``0:road`` without a value."""
    for name, value in zip(names, values, strict=True):
        if value is None and ":" in str(name):
            before, _, after = str(name).partition(":")
            return f"; put a space after the colon: '{before}: {after}'"
    return ""


def _loaded(value: Any) -> Any:
    if not isinstance(value, _Text):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return str(value)


def _judged(hint: Any, candidate: Any) -> Any:
    return _judge(hint).parse_object({"value": candidate}).value


# most keys hold the same few values in all the configurations that a matrix reads
_judged_once = functools.lru_cache(maxsize=4096, typed=True)(_judged)


@functools.cache
def _judge(hint: Any) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _inner(hint: Any) -> tuple[type | None, bool, bool]:
    """(dataclass below a key or None for a plain value, whether names come in between, whether null is accepted)."""
    if dataclasses.is_dataclass(hint):
        return hint, False, False
    args = typing.get_args(hint)
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(args[1]):
        return args[1], True, False
    inner = [arg for arg in args if dataclasses.is_dataclass(arg)] if _is_union(hint) else []
    return (inner[0], False, True) if inner else (None, False, False)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _choices(hint: Any) -> Iterator[str]:
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    for arg in typing.get_args(hint):
        yield from _choices(arg)


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def _describe(hint: Any) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(args[:-1]) + (" or " if args[:-1] else "") + args[-1]
    if _is_union(hint):
        return " or ".join(map(_describe, args))
    if typing.get_origin(hint) is list:
        return f"a list of ({_describe(args[0])})"
    if typing.get_origin(hint) is dict:
        return f"a mapping from {_describe(args[0])} to {_describe(args[1])}"
    return _WORDS.get(hint, str(hint))


def _suggest(name: str, parent: str, siblings: Iterable[str]) -> str:
    """Nearest key beside the unknown one, else of that name anywhere, else what is accepted there."""
    prefix = f"{parent}." if parent else ""
    for candidates in ({sibling: prefix + sibling for sibling in siblings}, last_parts(all_keys())):
        if match := difflib.get_close_matches(name, candidates, n=1, cutoff=0.6):
            return f"; did you mean {candidates[match[0]]!r}?"
    return f"; accepted here: {', '.join(siblings)}"


def last_parts(keys: Iterable[str]) -> dict[str, str]:
    """Last part of a dotted key -> the key; the first of equal last parts wins."""
    return {key.rpartition(".")[2]: key for key in reversed(list(keys))}


def all_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration that holds a value; the name of a target is written ``<name>``."""
    for name, hint in typing.get_type_hints(cls).items():
        inner, named, optional = _inner(hint)
        if inner is None or optional:
            yield prefix + name
        else:
            yield from all_keys(inner, f"{prefix}{name}.<name>." if named else f"{prefix}{name}.")


# --- values ---------------------------------------------------------------------------------------------------------


def find_problems(config: Config, *, training: bool = False) -> list[str]:
    """Every value that is of the right type and still wrong, one line each.

    Args:
        config: what was read.
        training: also ask for a source set with classes.
    """
    return [
        *_run_problems(config),
        *_data_problems(config, training),
        *_model_problems(config),
        *_toolbox_problems(config),
        *_gate_problems(config, training),
        *_adapt_problems(config, training),
        *_train_problems(config),
    ]


def _bounds(section: Any, prefix: str, **limits: str) -> Iterator[str]:
    """Check numbers against limits such as ``lr=">0"``; an unset (None) value passes."""
    tests = {
        ">0": (lambda v: v > 0, "a number above 0"),
        ">=0": (lambda v: v >= 0, "0 or more"),
        ">=1": (lambda v: v >= 1, "1 or more"),
        ">=2": (lambda v: v >= 2, "2 or more"),
        "0..1": (lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    }
    for name, limit in limits.items():
        value = getattr(section, name)
        passes, accepted = tests[limit]
        if isinstance(value, int | float) and not (math.isfinite(value) and passes(value)):
            yield f"{prefix}.{name}={value} is out of range; use {accepted}"


def _run_problems(config: Config) -> Iterator[str]:
    run = config.run
    yield from _bounds(run, "run", seed=">=0")
    if not re.fullmatch(r"[\w.\-]+", run.name) or run.name in (".", ".."):
        yield f"run.name={run.name!r} is no folder name; use letters, digits, '.', '_' and '-'"
    for key, value in METHODS.get(run.method, {}).items():
        found = functools.reduce(getattr, key.split("."), config)
        if found != value:
            yield f"run.method={run.method} means {key}={value}, but it is {found}; leave out one of the two"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", run.device):
        yield f"run.device={run.device!r} is unknown; use auto, cpu, cuda or cuda:<index>"


def _data_problems(config: Config, training: bool) -> Iterator[str]:
    data = config.data
    yield from _bounds(data, "data", crop=">=1", stride=">=1", batch_size=">=1", workers=">=0")
    if data.stride is not None and data.stride > data.crop:
        yield f"data.stride={data.stride} leaves gaps between windows of data.crop={data.crop}; use at most the crop"
    needed = training and data.source.kind == "folder"  # the other kinds bring their classes along
    if data.classes or needed:
        yield from _class_problems(data.classes, data.palette)
    for colour in data.palette:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", colour):
            yield f"data.palette: {colour!r} is no '#RRGGBB'"
    low_high = data.augment.resize
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] < math.inf:
        yield f"data.augment.resize={low_high} must be [low, high] with 0 < low <= high"
    yield from _bounds(data.augment, "data.augment", max_class_share="0..1")
    if training:
        yield from _set_problems(data.source, "data.source", data.classes)
    for name, target in data.targets.items():
        if not re.fullmatch(r"[\w.\-]+", name) or name in (SOURCE_DOMAIN, ".", ".."):
            yield f"data.targets.{name}: {name!r} cannot name a target; use letters, digits, '_', '-' and not 'source'"
        yield from _set_problems(target, f"data.targets.{name}", data.classes)
    if data.validation is not None:
        yield from _set_problems(data.validation, "data.validation", data.classes)
    if data.unlabelled is not None:
        yield from _set_problems(data.unlabelled, "data.unlabelled", data.classes)


def _class_problems(classes: Sequence[str], palette: Sequence[str]) -> Iterator[str]:
    if not 2 <= len(classes) <= 255:
        yield f"data.classes has {len(classes)} names; give 2 to 255 class names in the order of their indices"
    if twice := sorted({name for name in classes if list(classes).count(name) > 1}):
        yield f"data.classes names {', '.join(twice)} more than once"
    if palette and len(palette) != len(classes):
        yield f"data.palette has {len(palette)} colours for {len(classes)} classes; give one per class or none"


def _set_problems(item: SetConfig, prefix: str, classes: Sequence[str]) -> Iterator[str]:
    yield from _bounds(item, prefix, limit=">=1", first=">=0", tile=">=1", fit=">=1")
    if item.kind != "generated" and not item.root:
        yield f"{prefix}.root is missing; a set of kind {item.kind} needs the folder that holds it"
    if unknown := re.search(r"\$\{([^}]*)\}", item.root or ""):
        yield f"{prefix}.root names {unknown[0]}; give --data.roots.{unknown[1]} the folder that holds it"
    if item.kind != "folder" and not item.split:
        yield f"{prefix}.split is missing; a set of kind {item.kind} needs it"
    if item.bands is not None and (not item.bands or min(item.bands) < 1):
        yield f"{prefix}.bands={item.bands} must be one or more band numbers counted from 1"
    if item.value_range is not None and (len(item.value_range) != 2 or not item.value_range[0] < item.value_range[1]):
        yield f"{prefix}.value_range={item.value_range} must be [low, high] with low < high"
    for value, meaning in (item.label_map or {}).items():
        name = str(meaning)
        known = name in classes or name == "ignore" or (name.isdecimal() and int(name) < max(len(classes), 1))
        if classes and not known:
            yield f"{prefix}.label_map.{value}={name!r} is no class{nearest(name, [*classes, 'ignore'])}"


def _model_problems(config: Config) -> Iterator[str]:
    model = config.model
    yield from _bounds(model, "model", image_size=">=1", patch_size=">=1")
    layers = model.features
    if layers is not None and (len(layers) != 4 or layers != sorted(set(layers)) or min(layers) < 0):
        yield f"model.features={layers} must be four increasing 0-based layers"


def _toolbox_problems(config: Config) -> Iterator[str]:
    toolbox = config.toolbox
    if not toolbox.kinds or len(set(toolbox.kinds)) != len(toolbox.kinds):
        yield f"toolbox.kinds={toolbox.kinds} must name one or more of {', '.join(KINDS)}, each once"
    yield from _bounds(toolbox.spatial, "toolbox.spatial", rank=">=1", alpha=">0")
    yield from _bounds(toolbox.semantic, "toolbox.semantic", width=">=1", scale=">0")
    yield from _bounds(toolbox.frequency, "toolbox.frequency", width=">=1")
    cutoff = toolbox.frequency.cutoff
    if not isinstance(cutoff, str) and not 0 <= cutoff <= 1:
        yield f"toolbox.frequency.cutoff={cutoff} is out of range; use 0 to 1, or learnable"


def _adapt_problems(config: Config, training: bool) -> Iterator[str]:
    adapt = config.adapt
    yield from _bounds(config.refiner, "refiner", tokens=">=2", rank=">=1")
    yield from _bounds(adapt, "adapt", warmup=">=0", ema="0..1", weight=">=0", confidence="0..1")
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
    yield from _bounds(gate, "gate", k=">=1", interval=">=1", samples=">=1")
    if gate.method == "fixed" and not gate.sites:
        yield "gate.sites is empty; gate.method 'fixed' needs sites such as [spatial.7, semantic.0]"
    if training and gate.method != "fixed" and gate.sites:  # runs that ignored them can still be read
        yield f"gate.sites counts with gate.method=fixed alone, it is {gate.method}; leave them out, or give them as []"
    for site in gate.sites:
        kind, _, layer = site.partition(".")
        if kind not in config.toolbox.kinds or not layer.isdecimal():
            yield f"gate.sites: {site!r} is not <kind>.<layer> with a kind of {', '.join(config.toolbox.kinds)}"


def _train_problems(config: Config) -> Iterator[str]:
    train = config.train
    yield from _bounds(
        train,
        "train",
        iterations=">=1",
        lr=">0",
        weight_decay=">=0",
        power=">0",
        warmup=">=0",
        clip=">0",
        eval_every=">=1",
        log_every=">=1",
        checkpoint_every=">=1",
        keep_checkpoints=">=0",
    )
    if train.warmup >= train.iterations >= 1:
        yield f"train.warmup={train.warmup} leaves nothing of train.iterations={train.iterations}; use fewer"
