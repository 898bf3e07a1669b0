"""The numbers of finished cells, read back from their run folders and checked against each other."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cegate import figures
from cegate.config import SOURCE_DOMAIN, Config
from cegate.configfile import changed_values
from cegate.errors import CegateError, CheckpointError
from cegate.matrix.cells import DECIDED, WEIGHTS, Cell, is_place, read_saved_config
from cegate.matrix.statistics import headline
from cegate.methods import METHODS
from cegate.runfolder import FREE_ON_RESUME, read_record


@dataclass(frozen=True)
class Domain:
    """What a model scored on one domain."""

    record: Mapping[str, Any]
    """The evaluation, as in result.json."""
    names: tuple[str, ...]
    """[T] names of the tiles."""
    confusion: np.ndarray
    """[T, K, K] int64 pixel counts of each tile, rows truth."""

    @property
    def binary(self) -> bool:
        """Whether the task is a foreground class against the background."""
        return figures.headline(self.record)[0] != "mIoU"

    @property
    def chosen(self) -> list[int] | None:
        """Indices of the classes that means go over; None: all."""
        names = self.record.get("mean_classes")
        return names and [index for index, name in enumerate(self.record["per_class"]) if name in names]

    @property
    def foreground(self) -> float | None:
        """IoU of the foreground of a binary task, 0..1."""
        return self.score if self.binary else None

    @property
    def score(self) -> float:
        """The score that is compared, 0..1: the foreground's IoU of a binary task, else mIoU."""
        return figures.headline(self.record)[1]


@dataclass(frozen=True)
class CellResult:
    """The numbers of a finished cell."""

    cell: Cell
    config: Config
    iteration: int
    """Of the model that counts."""
    domains: Mapping[str, Domain]
    """Domain -> scores; ``source`` is the validation set."""
    trained_parameters: int
    head_parameters: int
    step_seconds: float | None
    score_seconds: float | None
    peak_memory_bytes: int | None
    device: str
    """Name of the GPU, or cpu."""
    backbone_sha256: str | None = None

    @property
    def targets(self) -> list[str]:
        """The domains that are compared."""
        return [name for name in self.domains if name != SOURCE_DOMAIN]


def read_cell(cell: Cell) -> CellResult:
    """Read a finished cell.

    Raises:
        CegateError: a file is missing, damaged or of another run; it is named.
    """
    path = cell.folder / "result.json"
    result = read_record(path)
    environment = read_record(cell.folder / "env.json")
    try:
        found = CellResult(
            cell=cell,
            config=read_saved_config(cell),
            iteration=result["iteration"],
            domains={name: _read_domain(cell, name, record) for name, record in result["after"].items()},
            trained_parameters=result["trained_parameters"],
            head_parameters=result["head_parameters"],
            step_seconds=result["step_seconds"],
            score_seconds=result["score_seconds"],
            peak_memory_bytes=result["peak_memory_bytes"],
            device=environment.get("gpu") or "cpu",
            backbone_sha256=environment.get("backbone_sha256"),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is not what this version writes ({type(error).__name__}: {error}); move the folder aside and run "
            "the cell again"
        ) from error
    if not found.targets:
        raise CheckpointError(f"{path} holds no target domain to compare; run the cell again with data.targets")
    return found


def _read_domain(cell: Cell, name: str, record: Mapping[str, Any]) -> Domain:
    path = cell.folder / "eval" / name / "tiles.npz"
    again = "move the run folder aside and run the cell again"
    try:
        with np.load(path) as arrays:
            names, confusion = tuple(arrays["names"].tolist()), arrays["confusion"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {again}") from error
    classes = len(record["per_class"])
    if confusion.shape != (len(names), classes, classes) or not names:
        raise CheckpointError(
            f"{path} holds counts of shape {list(confusion.shape)} for {len(names)} tiles and {classes} classes; "
            f"{again}"
        )
    domain = Domain(record, names, confusion)
    if domain.score is None:
        raise CheckpointError(
            f"{cell.folder}: domain {name} has no score, for none of its pixels has a label that counts; leave it out "
            "of data.targets"
        )
    pooled = float(headline(confusion.sum(0), binary=domain.binary, chosen=domain.chosen))
    if not abs(pooled - domain.score) < 1e-6:
        raise CheckpointError(
            f"{path} adds up to {100 * pooled:.3f} % where result.json says {100 * domain.score:.3f} %: they are not "
            f"of one model; {again}"
        )
    return domain


def read_cells(cells: Sequence[Cell]) -> tuple[list[CellResult], list[str]]:
    """The finished cells that can be read, and what is wrong with the others.

    Cells of a setting that were not tested on the same tiles as its first one are left out, for nothing about them
    could be paired.
    """
    results: list[CellResult] = []
    problems: list[str] = []
    first: dict[str, CellResult] = {}
    for cell in cells:
        if not cell.is_done:
            continue
        try:
            result = read_cell(cell)
            _refuse_other_tiles(first.setdefault(cell.setting, result), result)
        except CegateError as error:
            problems.append(f"{cell} is left out: {error}")
            continue
        results.append(result)
    return results, problems


def _refuse_other_tiles(first: CellResult, result: CellResult) -> None:
    if set(first.domains) != set(result.domains):
        raise CheckpointError(
            f"it was tested on {', '.join(result.domains)}, {first.cell} on {', '.join(first.domains)}; run one of "
            "them again in another --output"
        )
    for name, domain in result.domains.items():
        if domain.names != first.domains[name].names or domain.confusion.shape != first.domains[name].confusion.shape:
            raise CheckpointError(
                f"its tiles or classes of domain {name} are not those of {first.cell}; run one of them again in "
                "another --output"
            )


def _same_backbone(one: CellResult, other: CellResult) -> bool:
    return one.backbone_sha256 is not None and one.backbone_sha256 == other.backbone_sha256


def changed_settings(results: Sequence[CellResult]) -> list[str]:
    """What a reader of the tables must know: cells of a setting whose configurations differ beyond the method.

    One line per method and change, with the settings it holds for, and the seeds where not all of them have it.
    """
    decided = {key for keys in METHODS.values() for key in keys} | {*DECIDED, *FREE_ON_RESUME}
    first: dict[str, CellResult] = {}
    seeds: dict[tuple[str, str], list[int]] = {}
    changed: dict[tuple[str, str], dict[str, list[int]]] = {}
    for result in results:
        cell = result.cell
        reference = first.setdefault(cell.setting, result)
        seeds.setdefault((cell.method, cell.setting), []).append(cell.seed)
        changes = [
            f"{key} ({new}, not {old})"
            for key, (old, new) in changed_values(reference.config, result.config).items()
            if key not in decided and not is_place(key) and not (key == WEIGHTS and _same_backbone(reference, result))
        ]
        if changes:
            how = f"{reference.cell.method} seed {reference.cell.seed} in {', '.join(changes)}"
            changed.setdefault((cell.method, how), {}).setdefault(cell.setting, []).append(cell.seed)
    notes = []
    for (method, how), settings in changed.items():
        places = [
            setting if found == seeds[method, setting] else f"{setting} (seed {', '.join(map(str, found))})"
            for setting, found in settings.items()
        ]
        notes.append(f"{method} differs from {how}: {', '.join(places)}.")
    return notes
