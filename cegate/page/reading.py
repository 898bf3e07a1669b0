"""What a page knows of a run: its files, read once. No number comes from anywhere else."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cegate.adapter_folder import CONFIG_FILE
from cegate.config import SOURCE_DOMAIN, Config
from cegate.engine.results import Record, best_iteration, records_of
from cegate.errors import CheckpointError, ConfigError, shown
from cegate.fields import read_fields
from cegate.figures import in_order
from cegate.runfolder import RunFolder, read_record
from cegate.sites import SiteId


@dataclass(frozen=True)
class DomainFiles:
    """What lies in eval/<domain> of a run; ``None`` for a file that is not there."""

    domain: str
    folder: Path
    metrics: Record | None
    confusion: np.ndarray | None
    """[K, K] int64, rows truth."""
    tile_names: tuple[str, ...] | None
    tile_confusion: np.ndarray | None
    """[T, K, K] int64, rows truth, one per image."""


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder tells it."""

    label: str
    """Name on the page; told apart from the other runs."""
    folder: RunFolder
    config: Config
    config_text: str
    environment: Mapping[str, Any]
    """env.json; empty if there is none."""
    rounds: Sequence[Record]
    """Lines of gates.jsonl: the choices of the gate."""
    sites: tuple[str, ...]
    """Every site that the files let one know of, in order."""
    result: Record | None
    """result.json; ``None`` for a run that is unfinished or older than that file."""
    iteration: int | None
    """Iteration of the model that counts."""
    before: Mapping[str, Record]
    after: Mapping[str, Record]
    """Domain -> evaluation of frozen backbone + head, and of the model that counts."""

    @property
    def metrics(self) -> list[Record]:
        """Lines of metrics.jsonl."""
        return self.folder.metrics.records

    @property
    def reached(self) -> int:
        """The last iteration that the journals know of in the stage ``after``."""
        trained = (record["iteration"] for record in self.metrics if record.get("stage", record["split"]) == "after")
        return max([0, *trained, *(choice["iteration"] for choice in self.rounds)])

    @property
    def choices(self) -> list[Record]:
        """Rounds that switched something on; none for a run without sites."""
        return [choice for choice in self.rounds if choice["active"]]

    @property
    def end(self) -> int:
        """Iteration at which the last choice ends."""
        return max(self.reached, *(choice["iteration"] + 1 for choice in self.choices), 1)

    @property
    def layers(self) -> list[int]:
        """Layers that have sites."""
        return sorted({SiteId(site).layer for site in self.sites})

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, from the configuration or else from what was measured."""
        measured = next(iter({**self.before, **self.after}.values()), {})
        return tuple(self.config.data.classes) or tuple(measured.get("per_class", ()))

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that were measured, the source first."""
        found = dict.fromkeys([*self.after, *self.before])
        return tuple(sorted(found, key=lambda domain: domain != SOURCE_DOMAIN))


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read run folders.

    Raises:
        ConfigError: a folder is given twice, or holds a configuration that this version does not read.
        CheckpointError: a folder is no run, or a file in it is damaged; it is named.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(f"--run names {path} twice; give every run once")
        seen[path.resolve()] = path
    folders = [RunFolder(path) for path in paths]
    configs = [folder.config() for folder in folders]
    labels = _labels(paths, configs)
    return [_read(*parts) for parts in zip(labels, folders, configs, strict=True)]


def _labels(paths: Sequence[Path], configs: Sequence[Config]) -> Sequence[str]:
    """Run names (of cells of a matrix what they are), else folder names, else paths: the first to tell runs apart."""
    names = [
        _cell_title(path.resolve(), config) or config.run.name for path, config in zip(paths, configs, strict=True)
    ]
    for labels in (names, [path.resolve().name for path in paths]):
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _cell_title(path: Path, config: Config) -> str | None:
    """``setting / method / seed k`` of a run where `cegate bench` put it, in <setting>/<method>/seed_<k>."""
    if path.parent.name != config.run.method or path.name != f"seed_{config.run.seed}":
        return None
    return f"{path.parent.parent.name} / {config.run.method} / seed {config.run.seed}"


def _read(label: str, folder: RunFolder, config: Config) -> RunFiles:
    path = folder.result
    result = read_record(path) if path.is_file() else None
    if result is not None and not (isinstance(result, dict) and {"iteration", "before", "after"} <= result.keys()):
        raise CheckpointError(f"{path} lacks iteration, before or after; finish the run with cegate train --resume")
    records = folder.metrics.records
    if result is None:
        validated = config.data.validation is not None
        counts = best_iteration(records, "after", validated=validated)
        after = records_of(records, "after", counts)
        before = records_of(records, "before", best_iteration(records, "before", validated=validated))
    else:
        counts, before, after = result["iteration"], result["before"], result["after"]
        if not isinstance(before, dict) or not isinstance(after, dict):
            raise CheckpointError(f"{path} holds no scores by domain; finish the run with cegate train --resume")
    for record in (*before.values(), *after.values()):
        _check_scores(record, folder.path / "metrics.jsonl" if result is None else path)
    environment = folder.path / "env.json"
    return RunFiles(
        label=label,
        folder=folder,
        config=config,
        config_text=folder.config_file.read_text(encoding="utf-8"),
        environment=read_record(environment) if environment.is_file() else {},
        rounds=folder.gates.records,
        sites=_sites(folder, config),
        result=result,
        iteration=counts,
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class _ClassScores:
    IoU: float | None


@dataclass(frozen=True)
class _Scores:
    """What every record of an evaluation holds, beside more."""

    mIoU: float | None
    per_class: dict[str, _ClassScores] = field(default_factory=dict)


def _check_scores(record: Any, path: Path) -> None:
    try:
        if not isinstance(record, Mapping):
            raise ConfigError(f"{shown(record)} is no record of scores")
        classes = record.get("per_class", {})
        plain = {name: {"IoU": scores.get("IoU", "")} for name, scores in classes.items()}
        read_fields(_Scores, {**record, "per_class": plain})
    except (ConfigError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}; finish or evaluate the run again") from error


def _sites(folder: RunFolder, config: Config) -> tuple[str, ...]:
    """All scored sites. Without scores: the configured kinds on as many layers as choices or adapter speak of."""
    rounds = folder.gates.records
    sites = {site for choice in rounds for site in choice["scores"]}
    if not sites and (chosen := [SiteId(site) for choice in rounds for site in choice["active"]]):
        adapter = folder.adapter / CONFIG_FILE
        features = read_record(adapter).get("features", []) if adapter.is_file() else []
        depth, streams = 1 + max(*features, *(place.layer for place in chosen), 0), {place.stream for place in chosen}
        sites = {
            SiteId.of(kind, layer, stream)
            for kind in config.toolbox.kinds
            for layer in range(depth)
            for stream in streams
        }
    return tuple(in_order(sites))


def read_domain(run: RunFiles, domain: str) -> DomainFiles:
    """Read what the evaluation of a domain left.

    Raises:
        CheckpointError: a file is damaged, or counts other classes than the run has.
    """
    folder = run.folder.eval / domain
    metrics = read_record(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    if metrics is not None:
        _check_scores(metrics, folder / "metrics.json")
    arrays: dict[str, np.ndarray] = {}
    for name in ("confusion.npy", "tiles.npz"):
        if (folder / name).is_file():
            arrays |= _arrays(folder / name)
    names, tiles = arrays.get("names"), arrays.get("tiles")
    files = DomainFiles(
        domain=domain,
        folder=folder,
        metrics=metrics,
        confusion=arrays.get("confusion"),
        tile_names=None if names is None else tuple(map(str, names)),
        tile_confusion=tiles,
    )
    k = len(run.classes)
    for name, matrix, shape in (
        ("confusion.npy", files.confusion, (k, k)),
        ("tiles.npz", files.tile_confusion, (len(files.tile_names or ()), k, k)),
    ):
        if matrix is not None and matrix.shape != shape:
            raise CheckpointError(
                f"{folder / name} counts {list(matrix.shape)}, but the run's {k} classes need {list(shape)}; "
                f"{how_to_evaluate(run)}"
            )
    return files


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The array of an .npy file as ``confusion``; ``names`` and ``tiles`` of a tiles.npz."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"confusion": found}
        with found:
            return {"names": found["names"], "tiles": found["confusion"]}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); evaluate the run again") from error


def how_to_evaluate(run: RunFiles) -> str:
    """The command that writes eval/ of a run anew."""
    path = run.folder.path
    return f"evaluate again with this version: cegate evaluate --run {path} --output {path / 'eval'} --overwrite"
