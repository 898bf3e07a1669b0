"""Configurations as files, mappings and option strings: strict reading and writing. No torch here.

Every way in (YAML file, mapping, command line) goes through `read_config`, so that a `Config` read is a valid one. What
one value may be is in `cegate.config` and judged by `cegate.fields`, how they fit together in `cegate.consistency`;
here is where values come from.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cegate.config import SOURCE_DOMAIN, Config, SetConfig
from cegate.consistency import find_doubts, find_problems, sets_of
from cegate.errors import LONGEST, ConfigError, quoted, shown
from cegate.fields import Reader, hints_of, holds_number, loaded, section_of, takes_null
from cegate.methods import METHODS
from cegate.yamltext import Text, parse_yaml

log = logging.getLogger(__name__)

SECTIONS: dict[str, type] = hints_of(Config)
MOST_BYTES, MOST_DOTS = 2**20, 8
"""Of a file, and of a key."""

_WORDS_OF_OTHERS: dict[str, str] = {
    "run.name": "experiment exp_name run_name project",
    "run.work_dir": "output_dir out_dir save_dir log_dir default_root_dir",
    "run.seed": "random_seed manual_seed seed_everything",
    "run.device": "accelerator gpu gpus gpu_ids devices",
    "run.precision": "amp fp16 bf16 mixed_precision",
    "data.source": "dataset train_dataset train_dataloader data.train",
    "data.source.root": "data_root data_dir path",
    "data.source.images": "img_dir image_dir img_path",
    "data.source.masks": "ann_dir mask_dir seg_map_path labels",
    "data.source.ignore": "ignore_index ignore_label seg_pad_val",
    "data.targets": "test test_dataset test_dataloader",
    "data.unlabelled": "unlabeled unlabeled_target",
    "data.validation": "val val_dataset val_dataloader",
    "data.classes": "num_classes n_classes class_names names",
    "data.crop": "crop_size img_size input_size tile_size",
    "data.batch_size": "batch bs samples_per_gpu train_batch_size",
    "data.workers": "num_workers workers_per_gpu n_workers dataloader_num_workers",
    "model.backbone": "arch architecture encoder encoder_name model.name model_name",
    "model.weights": "pretrained checkpoint load_from init_cfg encoder_weights",
    "model.head": "decode_head decoder",
    "toolbox.spatial.rank": "lora_rank lora_r",
    "toolbox.spatial.alpha": "lora_alpha",
    "gate.k": "top_k topk",
    "train.iterations": "epochs max_epochs num_epochs max_iters max_iter num_iters iters max_steps num_steps steps",
    "train.lr": "learning_rate base_lr init_lr max_lr",
    "train.weight_decay": "wd l2",
    "train.schedule": "scheduler lr_scheduler lr_config param_scheduler",
    "train.warmup": "warmup_iters warmup_steps warmup_epochs",
    "train.clip": "grad_clip clip_grad max_grad_norm gradient_clip_val",
    "train.eval_every": "val_interval eval_interval val_check_interval eval_steps",
    "train.log_every": "log_interval log_every_n_steps logging_steps",
    "train.checkpoint_every": "save_every save_interval save_steps checkpoint_interval",
}
SYNONYMS = {word: key for key, words in _WORDS_OF_OTHERS.items() for word in words.split()}
"""Words of mmsegmentation, Lightning, Transformers and PEFT, alone or dotted -> the key that means it here."""
_SQUEEZED_SYNONYMS = {word.replace("_", ""): key for word, key in SYNONYMS.items()}


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
        mapping, where = _without_empty(Config, source), ""
    else:
        path = find_config(source)
        mapping, where = read_mapping(path), f"{path}: "
    before, problems = _build(mapping)
    decided = METHODS.get(before.run.method, {})
    mapping = functools.reduce(_put, [(k, v) for k, v in decided.items() if _get(mapping, k) is None], mapping)
    given = [(key, _typed(key, text)) for key, text in overrides]
    for pair in given:
        method = _get(_put({}, pair), "run.method")
        # in place of what the file's method had decided
        mapping = functools.reduce(_put, METHODS.get(str(method), {}).items(), mapping)
    config, found = _build(functools.reduce(_put, given, mapping))
    _refuse(where, [problem for problem in problems if problem in found])  # an override may have mended one
    _refuse("", found)
    _refuse("", list(_idle_roots(config, before, overrides, training)))
    config = _with_held_out(_with_roots(config))
    if config.modal.single:
        config = _map_sets(config, lambda item: dataclasses.replace(item, second=None))
    _refuse("", find_problems(config, training=training))
    if training:
        for warning in find_doubts(config):
            log.warning(warning)
    return config


def _build(mapping: Mapping[str, Any]) -> tuple[Config, list[str]]:
    reader = Reader(_suggest)
    return reader.read(Config, mapping), reader.problems


def _typed(key: str, text: str) -> Text:
    """What was typed for a key on the command line."""
    if key.count(".") > MOST_DOTS:
        raise ConfigError(f"unknown key {quoted(key)}; no key has so many dots")
    try:
        loaded(Text(text))
    except ConfigError as error:
        raise ConfigError(f"--{key}: {error}") from error
    return Text(text)


def _idle_roots(config: Config, before: Config, overrides: Sequence[tuple[str, str]], training: bool) -> Iterator[str]:
    """Roots given in vain: the sets of a run's config.yaml hold folders, not names of roots.

    Args:
        config: with the overrides, its roots unresolved.
        before: what the source says.
        overrides: (dotted key, text) pairs.
        training: one list of roots may serve several settings, so that a name that no set uses is no mistake.
    """
    roots = {f"--{key}.root": item.root for key, item in sets_of(config) if item.root}
    for key, text in overrides:
        name = key.removeprefix("data.roots.")
        old = (before.data.roots or {}).get(name)
        used = name == key or any(f"${{{name}}}" in root for root in roots.values())
        below = [option for option, root in roots.items() if old and root.startswith(old)]
        if not used and old != text and (below or (roots and not training)):
            yield (
                f"{key}={text} changes nothing, for no set has a root with ${{{name}}} (those of a run are resolved); "
                f"give {', '.join(below or roots)} instead"
            )


def _with_roots(config: Config) -> Config:
    """Every ``${name}`` in the root of a set, as far as data.roots knows the name."""
    roots = config.data.roots

    def resolve(item: SetConfig) -> SetConfig:
        known = item.root and re.sub(r"\$\{([\w\-]+)\}", lambda match: roots.get(match[1], match[0]), item.root)
        return dataclasses.replace(item, root=known)

    return _map_sets(config, resolve)


def _with_held_out(config: Config) -> Config:
    """What val_fraction holds out of the source is the validation set: the same set with the same fraction."""
    data = config.data
    if data.source.val_fraction is None or data.validation is not None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(data, validation=data.source))


def _map_sets(config: Config, change: Callable[[SetConfig], SetConfig]) -> Config:
    """The configuration with every set changed."""
    data = config.data
    sets = {name: getattr(data, name) for name in ("source", "validation", "unlabelled")}
    changed = {name: item and change(item) for name, item in sets.items()}
    targets = {name: change(target) for name, target in data.targets.items()}
    return dataclasses.replace(config, data=dataclasses.replace(data, **changed, targets=targets))


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
    empty: set[tuple[str, ...]] = set()
    mapping = _read_yaml(path, empty)
    bases = mapping.pop("base", None)
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases] if bases is not None else []:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base={shown(base)} is not accepted; expected a file, or a list of files")
        try:
            found = find_config(base, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: base: {error}") from error
        merged = _merged(merged, _read_on_base(found, (*readers, path.resolve())))
    return _merged(merged, _without_empty(Config, mapping, empty))


def _without_empty(hint: Any, value: Any, empty: Collection[tuple[str, ...]] = (), path: tuple[str, ...] = ()) -> Any:
    """Nested mappings without their empty values (``name:``): such a key is one left out, so that the base's or the
    default counts; said aloud. Who means null writes it. An empty number stays where null is none of the key's values,
    and is refused: who leaves ``iterations:`` open forgot it, and 20,000 would be as far from what was meant as any.

    Args:
        hint: what the value should be.
        value: as read.
        empty: keys with nothing behind them; the others that are None are null, which is the same where null is none of
            their values.
        path: the value's key.
    """
    cls, named, _ = section_of(hint)
    if cls is None or not isinstance(value, Mapping):
        return value
    if named:
        return {name: _without_empty(cls, item, empty, (*path, name)) for name, item in value.items()}
    hints, kept = hints_of(cls), {}
    for name, item in value.items():
        key = (*path, name)
        is_left = name in hints and (key in empty if takes_null(hints[name]) else not holds_number(hints[name]))
        if item is None and is_left:
            log.warning("%s is empty, as if it were left out", ".".join(map(shown, key)))
        else:
            kept[name] = _without_empty(hints.get(name), item, empty, key)
    return kept


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, where ``above`` wins."""
    both = {
        key: _merged(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)
    }
    return {**below, **above, **both}


def _read_yaml(path: Path, empty: set[tuple[str, ...]]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"{path} holds more than {MOST_BYTES} bytes; a configuration is a short text")
        mapping = parse_yaml(data.decode("utf-8-sig"), empty)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        kind = "list" if isinstance(mapping, list) else "text"
        raise ConfigError(f"{path} holds a {kind}; a mapping with {', '.join(SECTIONS)} is expected")
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


def domain_title(domain: str) -> str:
    """What people read of a domain: *validation* for the held-out part, of which files say ``source``."""
    return "validation" if domain == SOURCE_DOMAIN else domain


# --- keys -----------------------------------------------------------------------------------------------------------


def _get(mapping: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for name in key.split("."):
        mapping = loaded(mapping)
        mapping = mapping.get(name) if isinstance(mapping, Mapping) else None
    return mapping


def _put(mapping: Any, pair: tuple[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with one dotted key replaced; a mapping typed as text before it keeps its others."""
    name, _, rest = pair[0].partition(".")
    mapping = loaded(mapping)
    mapping = dict(mapping) if isinstance(mapping, Mapping) else {}
    mapping[name] = _put(mapping.get(name), (rest, pair[1])) if rest else pair[1]
    return mapping


def _suggest(name: str, parent: str, siblings: Iterable[str]) -> str:
    """What an unknown key was probably meant to be, else what is accepted there."""
    prefix = f"{parent}." if parent else ""
    key = nearest_key(f"{prefix}{name}", {sibling: prefix + sibling for sibling in siblings})
    return f"; did you mean {key!r}?" if key else f"; accepted here: {', '.join(siblings)}"


def nearest_key(name: str, near: Mapping[str, str], keys: Iterable[str] | None = None) -> str | None:
    """The key that a name was probably meant to be: another library's word for it, or one spelt alike, near or far.

    Args:
        name: as given, with its dots.
        near: last part -> key, of those that come first.
        keys: all keys that count; default: those of the configuration.
    """
    name = name[-LONGEST:].replace("-", "_").lower()
    last = name.rpartition(".")[2]
    everywhere = last_parts(all_keys() if keys is None else keys)
    meant = _SQUEEZED_SYNONYMS.get(name.replace("_", ""))
    if not meant and last not in everywhere:
        meant = _SQUEEZED_SYNONYMS.get(last.replace("_", ""))
    if meant:
        return near.get(meant.rpartition(".")[2], meant)
    for candidates in (near, everywhere):
        if match := difflib.get_close_matches(last, candidates, n=1, cutoff=0.6):
            return candidates[match[0]]
    return None


def last_parts(keys: Iterable[str]) -> dict[str, str]:
    """Last part of a dotted key -> the key; the first of equal last parts wins."""
    return {key.rpartition(".")[2]: key for key in reversed(list(keys))}


def all_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration that holds a value; the name of a target is written ``<name>``."""
    for name, hint in hints_of(cls).items():
        inner, named, optional = section_of(hint)
        if inner is None or optional:
            yield prefix + name
        else:
            yield from all_keys(inner, f"{prefix}{name}.<name>." if named else f"{prefix}{name}.")
