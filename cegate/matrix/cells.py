"""The cells of a matrix: a setting, a method and a seed each, with a run folder of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from cegate.config import Config
from cegate.configfile import changed_values, find_config, read_config, read_mapping, to_yaml
from cegate.errors import CegateError, ConfigError
from cegate.methods import METHODS
from cegate.runfolder import FREE_ON_RESUME, read_record

DECIDED = ("run.method", "run.seed", "run.work_dir", "run.device")
"""Keys that the matrix sets itself."""
Overrides = Sequence[tuple[str, str]]
WEIGHTS = "model.weights"
RATE = re.compile(r"(.+)/lr_([0-9.e+-]+)")
"""Name of a setting at a learning rate."""
_ROOT = re.compile(r"\$\{([\w\-]+)\}")


@dataclass(frozen=True)
class Cell:
    """One training. Beside its folder lie ``seed_<k>.log``, and ``seed_<k>.error`` while its last try has failed."""

    setting: str
    method: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.setting} {self.method} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether the run is complete; such a cell is never run again."""
        return (self.folder / "result.json").is_file()

    @property
    def is_started(self) -> bool:
        """Whether there is a run to go on with, or a complete one."""
        return (self.folder / "config.yaml").is_file()

    @property
    def state(self) -> str:
        """``done``, ``unfinished`` or ``new``."""
        return "done" if self.is_done else "unfinished" if self.is_started else "new"

    @property
    def log(self) -> Path:
        """What the cell's processes wrote, one after another."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def error(self) -> Path:
        """Why the last try failed, in one line."""
        return self.folder.with_name(f"{self.folder.name}.error")

    @property
    def lock(self) -> Path:
        """Held by whoever runs the cell."""
        return self.folder.with_name(f".{self.folder.name}.lock")


@dataclass(frozen=True)
class Setting:
    """A configuration that every method is trained with."""

    name: str
    """Its folder below the output: the name of a shipped configuration, or that of a file without suffix."""
    config: str
    """What `cegate train --config` takes."""
    rate: str | None = None
    """Its ``train.lr``, where rates are an axis; the name then ends in ``/lr_<rate>``."""

    @property
    def overrides(self) -> list[tuple[str, str]]:
        """What the setting puts on top of its configuration."""
        return [] if self.rate is None else [("train.lr", self.rate)]


def name_settings(given: Sequence[str]) -> list[Setting]:
    """Settings by the names or files given, each once.

    Raises:
        ConfigError: one is neither a file nor shipped, or two files share a name.
    """
    settings: dict[str, Setting] = {}
    for config in dict.fromkeys(given):
        path = find_config(config)
        name = path.stem if Path(config).is_file() else config
        if name in settings:
            raise ConfigError(
                f"--settings {settings[name].config} and {config} would share the folder {name}; rename one file"
            )
        settings[name] = Setting(name, config)
    return list(settings.values())


def with_rates(settings: Sequence[Setting], rates: Sequence[str]) -> list[Setting]:
    """Every setting at every learning rate, each a setting of its own."""
    return [
        replace(setting, name=f"{setting.name}/lr_{rate}", rate=rate)
        for setting in settings
        for rate in dict.fromkeys(rates)
    ]


def plan_cells(settings: Sequence[Setting], methods: Sequence[str], seeds: Sequence[int], output: Path) -> list[Cell]:
    """Every cell once, seed by seed, so that a matrix that is stopped early holds whole seeds."""
    return [
        Cell(setting.name, method, seed, output / setting.name / method / f"seed_{seed}")
        for seed in dict.fromkeys(seeds)
        for setting in settings
        for method in dict.fromkeys(methods)
    ]


def find_cells(output: Path) -> list[Cell]:
    """The cells that were ever tried below ``output``, ordered by setting, method and seed."""
    cells = dict.fromkeys(_search(output, output))
    return sorted(cells, key=lambda cell: (cell.setting, list(METHODS).index(cell.method), cell.seed))


def _search(folder: Path, output: Path) -> Iterator[Cell]:
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        seed = re.fullmatch(r"(seed_(\d+))(\.error)?", path.name)
        if seed and folder.name in METHODS and folder.parent != output:
            yield Cell(folder.parent.relative_to(output).as_posix(), folder.name, int(seed[2]), folder / seed[1])
        elif path.is_dir() and not path.name.startswith("."):
            yield from _search(path, output)


# --- configurations -------------------------------------------------------------------------------------------------


def read_configs(
    settings: Sequence[Setting], methods: Sequence[str], overrides: Overrides
) -> dict[tuple[str, str], Config]:
    """(setting, method) -> configuration, without seed and folder.

    Raises:
        ConfigError: an override of a key that the matrix decides, roots that were not given (all of them are named), a
            configuration that no method fits, or one with nothing to test on.
    """
    for key, _ in overrides:
        if key in DECIDED or (key == "train.lr" and any(setting.rate for setting in settings)):
            raise ConfigError(f"--{key} is not for the command line here; cegate bench sets it for every cell")
    _refuse_missing_roots(settings, overrides)
    configs: dict[tuple[str, str], Config] = {}
    problems: dict[str, list[str]] = {}
    for setting in settings:
        for method in methods:
            try:
                config = read_config(
                    setting.config, [("run.method", method), *overrides, *setting.overrides], training=True
                )
            except ConfigError as error:
                problems.setdefault(str(error), []).append(f"{setting.name} with {method}")
                continue
            if not config.data.targets:
                problems.setdefault(
                    "there is nothing to test on; give data.targets, as in --data.targets.elsewhere.root DIR", []
                ).append(setting.name)
            configs[setting.name, method] = config
    if problems:
        raise ConfigError("; ".join(f"{', '.join(dict.fromkeys(who))}: {text}" for text, who in problems.items()))
    return configs


def _refuse_missing_roots(settings: Sequence[Setting], overrides: Overrides) -> None:
    """One message for all settings, which mostly share their roots."""
    missing: dict[str, list[str]] = {}
    given = [override for override in overrides if override[0].startswith("data.roots")]
    for setting in settings:
        data = read_mapping(find_config(setting.config)).get("data") or {}
        roots = read_config({"data": {"roots": data.get("roots") or {}}}, given).data.roots
        for name in dict.fromkeys(_ROOT.findall(str({**data, "roots": None}))):
            if name not in roots:
                missing.setdefault(name, []).append(setting.name)
    if missing:
        needs = "; ".join(f"--data.roots.{name} DIR for {', '.join(who)}" for name, who in missing.items())
        raise ConfigError(f"folders of data sets are missing; give {needs}")


def configure(cell: Cell, config: Config) -> Config:
    """The configuration of a cell."""
    run = replace(config.run, seed=cell.seed, work_dir=str(cell.folder))
    return replace(config, run=run)


def refuse_other_runs(cells: Sequence[Cell], configs: dict[tuple[str, str], Config]) -> None:
    """Refuse folders that hold a run of another configuration, whose numbers would mix with ours.

    A finished run may have its data elsewhere, and its weights where they make the same backbone; one that goes on may
    not.

    Raises:
        ConfigError: names the keys that differ, and up to three of the folders.
    """
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if cell.is_started:
            wanted = configure(cell, configs[cell.setting, cell.method])
            keys = _other_keys(read_config(cell.folder / "config.yaml"), wanted, moved=cell.is_done)
            if WEIGHTS in keys and cell.is_done and _has_backbone(cell, wanted):
                keys.remove(WEIGHTS)
            if keys:
                found.setdefault(tuple(keys), []).append(cell)
    if found:
        raise ConfigError(
            "; ".join(
                f"{_some([str(cell.folder) for cell in held])} {'holds a run' if len(held) == 1 else 'hold runs'} with "
                f"other values of {', '.join(keys)}"
                for keys, held in found.items()
            )
            + "; give the values they were run with, or another --output"
        )


def _has_backbone(cell: Cell, config: Config) -> bool:
    """Whether the weights that a configuration names make the backbone that a cell was run with."""
    environment = cell.folder / "env.json"
    recorded = read_record(environment).get("backbone_sha256") if environment.is_file() else None
    model, bands = config.model, len(config.data.source.bands or (1, 2, 3))
    size = model.image_size or config.data.crop
    return recorded == _backbone_hash(model.backbone, model.weights, size, model.patch_size, bands)


@cache
def _backbone_hash(name: str, weights: str, image_size: int, patch_size: int | None, bands: int) -> str:
    from cegate.backbone.vit import build_vit, weight_hash

    vit = build_vit(name, weights=weights, image_size=image_size, patch_size=patch_size, in_chans=bands)
    return weight_hash(vit)


def _other_keys(old: Config, new: Config, *, moved: bool) -> list[str]:
    """Keys that change a run's numbers and differ."""
    free = set(FREE_ON_RESUME)
    if not new.data.classes:  # the source set brought them along
        free |= {"data.classes", "data.palette"}
    changed = changed_values(old, new)
    decided = (".second.bands", ".second.surplus")  # likewise
    free |= {key for key, (_, given) in changed.items() if key.endswith(decided) and given is None}
    return [key for key in changed if key not in free and not (moved and is_place(key))]


def is_place(key: str) -> bool:
    """Whether a key only says where data lie."""
    return key.startswith("data.roots.") or key == "data.roots" or (key.startswith("data.") and key.endswith(".root"))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def training_key(config: Config) -> str:
    """Equal for runs of one method that train alike with equal seeds: they differ only in the domains they test on."""
    run = replace(config.run, name="run", work_dir=None, seed=0, device="auto", log=["jsonl"])
    model = replace(config.model, weights=Path(config.model.weights).name)  # a file that was moved is the same file
    return to_yaml(replace(config, run=run, model=model, data=replace(config.data, targets={}, roots={})))


def read_saved_config(cell: Cell) -> Config:
    """The configuration that a cell was run with.

    Raises:
        CegateError: it cannot be read; the file is named.
    """
    path = cell.folder / "config.yaml"
    try:
        return read_config(path)
    except ConfigError as error:
        raise CegateError(f"{path} cannot be read by this version: {error}") from error
