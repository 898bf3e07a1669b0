from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cegate.configfile import read_config, to_yaml
from cegate.matrix.cells import Cell
from cegate.metrics import Confusion

CLASSES = ("background", "building", "road")
WriteCell = Callable[..., Cell]


def draw_tiles(score: float, *, tiles: int = 12, classes: int = 3, domain: str = "north", seed: int = 0) -> np.ndarray:
    """Counts [T, K, K] of tiles where about a share ``score`` of each class is right, errors depending on the seed."""
    scenes = np.random.default_rng([len(domain), *domain.encode()])  # tiles differ, alike for all models
    noise = np.random.default_rng([seed, *domain.encode()])
    pixels = scenes.integers(200, 2000, (tiles, classes))
    share = np.clip(score + scenes.normal(0, 0.08, (tiles, classes)) + noise.normal(0, 0.02, (tiles, classes)), 0, 1)
    right = (pixels * share).astype(np.int64)
    counts = np.zeros((tiles, classes, classes), np.int64)
    for k in range(classes):
        counts[:, k, k] = right[:, k]
        counts[:, k, (k + 1) % classes] = pixels[:, k] - right[:, k]
    return counts


@pytest.fixture
def write_cell(tmp_path: Path) -> WriteCell:
    """Write the run folder of a finished cell, as `cegate train` leaves it."""

    def write(
        setting: str,
        method: str,
        seed: int,
        tiles: Mapping[str, np.ndarray],
        *,
        classes: Sequence[str] = CLASSES,
        **overrides: str,
    ) -> Cell:
        folder = tmp_path / setting / method / f"seed_{seed}"
        folder.mkdir(parents=True)
        targets = {name: {"kind": "generated", "split": "arid"} for name in tiles if name != "source"}
        source = {"kind": "generated", "split": "temperate", "tile": 32 + len(setting)}
        mapping: dict[str, Any] = {"data": {"classes": list(classes), "source": source, "targets": targets}}
        given = [("run.method", method), ("run.seed", str(seed)), ("run.work_dir", str(folder))]
        given += [(key.replace("__", "."), value) for key, value in overrides.items()]
        (folder / "config.yaml").write_text(to_yaml(read_config(mapping, given)))
        (folder / "env.json").write_text(json.dumps({"device": "cpu", "gpu": None}))
        records = {}
        for domain, counts in tiles.items():
            scores = Confusion(classes, counts.sum(0)).scores()
            records[domain] = {"iteration": 9, "split": "after", "domain": domain, "loss": 0.5, **scores.to_dict()}
            place = folder / "eval" / domain
            place.mkdir(parents=True)
            names = np.array([f"{domain}/{number:03d}" for number in range(len(counts))])
            np.savez(place / "tiles.npz", names=names, confusion=counts)
        result = {
            "iteration": 9,
            "before": {},
            "after": records,
            "trained_parameters": 3_400_000,
            "head_parameters": 20_000_000,
            "step_seconds": 0.25 + seed,
            "score_seconds": 1.5 if method == "gate" else None,
            "peak_memory_bytes": 3 * 2**30,
        }
        (folder / "result.json").write_text(json.dumps(result))
        return Cell(setting, method, seed, folder)

    return write


@pytest.fixture
def write_matrix(write_cell: WriteCell) -> Callable[..., list[Cell]]:
    """Write finished cells of methods with given skill on a setting with given domains."""

    def write(setting: str, skill: Mapping[str, float], domains: Sequence[str] = ("north",), seeds: int = 3):
        return [
            write_cell(
                setting, method, seed, {d: draw_tiles(score, domain=d, seed=97 * seed + number) for d in domains}
            )
            for number, (method, score) in enumerate(skill.items())
            for seed in range(seeds)
        ]

    return write
