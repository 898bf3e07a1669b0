"""Run folders made of nothing but files, so that a page's numbers can be compared with what was written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cegate.configfile import read_config, to_yaml
from cegate.metrics import Confusion
from cegate.runfolder import write_json, write_text

CLASSES = ["background", "building", "forest", "road", "water"]
TILE = 32


def config_of(path: Path, **changes: object) -> Any:
    """Configuration of a run on generated scenes; keywords are dotted keys with two underscores for the dot."""
    mapping = {
        "run": {"name": re.sub(r"[^\w.-]", "_", path.name), "work_dir": str(path), "device": "cpu"},
        "data": {
            "classes": CLASSES,
            "source": {"kind": "generated", "split": "temperate", "limit": 4, "tile": TILE},
            "validation": {"kind": "generated", "split": "temperate", "first": 100, "limit": 3, "tile": TILE},
            "targets": {"arid": {"kind": "generated", "split": "arid", "limit": 8, "tile": TILE}},
            "crop": TILE,
            "workers": 0,
        },
        "model": {"weights": "none"},
        "gate": {"k": 5, "interval": 100},
        "train": {"iterations": 600, "baseline": True},
    }
    return read_config(mapping, [(key.replace("__", "."), str(value)) for key, value in changes.items()])


def gate_lines(
    rounds: int, layers: int, k: int, *, interval: int = 100, scored: bool = True, seed: int = 0
) -> list[dict[str, Any]]:
    """Lines of gates.jsonl whose scores drift slowly; shares of the kind, from masses of very different size."""
    rng = np.random.default_rng(seed)
    sites = [f"{kind}.{layer}" for kind in ("spatial", "semantic", "frequency") for layer in range(layers)]
    level = rng.normal(size=(3, layers))
    lines = []
    for number in range(rounds):
        level = level + 0.25 * rng.normal(size=level.shape)
        mass = np.exp(level) * np.array([[3.0], [0.5], [1.0]])
        scores = mass / mass.sum(axis=1, keepdims=True)
        order = np.argsort(-scores.ravel(), kind="stable")[:k]
        active = [sites[index] for index in sorted(order)]
        line = {"iteration": number * interval, "scores": {}, "mass": {}, "active": active}
        if scored:
            line["scores"] = dict(zip(sites, scores.ravel().tolist(), strict=True))
            line["mass"] = dict(zip(sites, mass.ravel().tolist(), strict=True))
        lines.append(line)
    return lines


def counts_of(tiles: int, classes: Sequence[str], seed: int, *, absent: int | None = None) -> np.ndarray:
    """[T, K, K] pixel counts that favour the diagonal; the later tiles are better."""
    rng = np.random.default_rng(seed)
    k = len(classes)
    counts = rng.integers(0, 40, (tiles, k, k)) + np.arange(1, tiles + 1)[:, None, None] * 60 * np.eye(k, dtype=int)
    if absent is not None:
        counts[:, absent] = counts[:, :, absent] = 0
    return counts.astype(np.int64)


def write_run(
    path: Path,
    *,
    gates: Sequence[dict[str, Any]] | None = None,
    tiles: int = 8,
    before: bool = True,
    finished: bool = True,
    absent: int | None = None,
    seed: int = 0,
    **changes: object,
) -> Path:
    """Write the folder of a run without training anything."""
    config = config_of(path, run__seed=seed, **changes)
    classes, iterations = config.data.classes, config.train.iterations
    write_text(path / "config.yaml", to_yaml(config))
    versions = {"cegate": "0.1.0", "torch": "2.15.0"}
    data = {"train": {"images": 4, "fingerprint": "0123456789abcdef"}}
    write_json(path / "env.json", {"versions": versions, "device": "cpu", "gpu": None, "data": data})
    lines: list[dict[str, Any]] = []
    result: dict[str, Any] = {"iteration": iterations, "before": {}, "after": {}, "trained_parameters": 12345}
    result |= {"head_parameters": 678, "step_seconds": 0.25, "score_seconds": None, "peak_memory_bytes": 3 * 2**30}
    domains = [*(["source"] if config.data.validation else []), *config.data.targets]
    for stage in ("before", "after") if before else ("after",):
        for iteration in range(50, iterations + 1, 50):
            loss = (1.0 if stage == "before" else 0.8) * 100 / (100 + iteration)
            train = {"iteration": iteration, "split": "train", "stage": stage, "domain": "source"}
            lines.append({**train, "loss": loss, "lr": 1e-4})
        for number, domain in enumerate(domains):
            counts = counts_of(tiles, classes, seed=100 * seed + 10 * number + (stage == "after"), absent=absent)
            counts += (stage == "after") * 30 * np.eye(len(classes), dtype=np.int64)
            if absent is not None:
                counts[:, absent] = 0
            scores = Confusion(classes, counts.sum(axis=0)).scores().to_dict()
            record = {"iteration": iterations, "split": stage, "domain": domain, "loss": 0.5, **scores}
            lines += [{**record, "iteration": iterations // 2, "mIoU": 0.9 * scores["mIoU"]}, record]
            result[stage][domain] = record
            if stage == "after":
                folder = path / "eval" / domain
                write_json(folder / "metrics.json", {"domain": domain, "images": tiles, "loss": 0.5, **scores})
                np.save(folder / "confusion.npy", counts.sum(axis=0))
                names = np.array([f"{domain}/{index:05d}" for index in range(tiles)])
                np.savez(folder / "tiles.npz", names=names, confusion=counts)
    write_text(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    chosen = gate_lines(6, 12, 5, seed=seed) if gates is None else gates
    write_text(path / "gates.jsonl", "".join(json.dumps(line) + "\n" for line in chosen))
    if finished:
        write_json(path / "result.json", result)
    return path


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run` below the test's own folder."""
    return lambda name="run", **more: write_run(tmp_path / name, **more)


@pytest.fixture
def drawn() -> None:
    """Ask for it where a test looks at the pictures that matplotlib makes."""


@pytest.fixture(autouse=True)
def _pictures_cost_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests read the page; its figures are built, not rendered."""
    if "drawn" not in request.fixturenames:
        for part in ("choice", "outcome"):
            monkeypatch.setattr(f"cegate.page.{part}.svg_uri", lambda figure: "data:image/svg+xml,<svg/>")
