from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cegate.config import Config
from cegate.configfile import read_config
from cegate.engine.trainer import Trainer

SMALL: dict[str, Any] = {
    "run": {"name": "small", "device": "cpu"},
    "data": {
        "classes": ["background", "building", "forest", "road", "water"],
        "source": {"kind": "generated", "split": "temperate", "limit": 4, "tile": 48},
        "validation": {"kind": "generated", "split": "temperate", "first": 100, "limit": 1, "tile": 32},
        "targets": {"arid": {"kind": "generated", "split": "arid", "limit": 1, "tile": 40}},
        "crop": 32,
        "batch_size": 2,
        "workers": 0,
    },
    "model": {"weights": "none"},
    "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 4}, "frequency": {"width": 2}},
    "gate": {"k": 5, "interval": 3, "samples": 3},
    "train": {"iterations": 7, "lr": 1e-2, "eval_every": 4, "log_every": 2, "checkpoint_every": 3},
}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Config]:
    """Configuration of a run of seconds; keywords are dotted keys with two underscores for the dot."""

    def make(folder: str = "run", **changes: object) -> Config:
        overrides = [("run.work_dir", str(tmp_path / folder))]
        overrides += [(key.replace("__", "."), str(value)) for key, value in changes.items()]
        return read_config(SMALL, overrides, training=True)

    return make


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that drawing takes."""
    monkeypatch.setattr(Trainer, "_draw", lambda self: None)
