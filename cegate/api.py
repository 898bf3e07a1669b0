"""What ``import cegate`` offers: build a model from a configuration, or load one from a run or adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cegate import segmenter
from cegate.adapters import Adapter
from cegate.config import Config
from cegate.configfile import read_config
from cegate.errors import ConfigError
from cegate.segmenter import Segmenter


def build(config: Config | Mapping[str, Any] | str | Path) -> Segmenter:
    """Build a segmenter from a configuration: its sections model, toolbox and gate, and data.classes.

    Args:
        config: a :class:`~cegate.config.Config`, a nested dict, or the path of a YAML file.

    Raises:
        ConfigError: a key is unknown or a value does not fit.
        BackboneError: the backbone cannot be built or its weights do not fit.
    """
    return segmenter.build(config if isinstance(config, Config) else read_config(config))


def load(path: str | Path, device: str | torch.device | None = None, *, weights: str | Path | None = None) -> Segmenter:
    """Load a run folder or an adapter folder, strictly.

    Args:
        path: folder with ``adapter_config.json``, or a run folder with ``adapter/``.
        device: where to put it; default: a GPU if there is one.
        weights: backbone weights, where the file used in training lies elsewhere here.

    Raises:
        CheckpointError: no such folder, another backbone, or missing or extra weights.
    """
    from cegate.adapter_folder import load_adapter

    return load_adapter(Path(path), device, weights=None if weights is None else str(weights))


def load_many(
    paths: Mapping[str, str | Path], device: str | torch.device | None = None, *, weights: str | None = None
) -> Segmenter:
    """Load the adapters of several domains over one backbone; ``model(images, adapter=[...])`` runs them side by side.

    Args:
        paths: name -> run or adapter folder. The model's own weights, for calls without ``adapter``, are the first's.
        device: where to put it; default: a GPU if there is one.
        weights: backbone weights, where the file used in training lies elsewhere here.

    Raises:
        ConfigError: no folder is given.
        CheckpointError: a folder has no adapter, or adapters differ in backbone, toolbox or layers of features.
    """
    from cegate.adapter_folder import load_adapter

    if not paths or not isinstance(paths, Mapping):
        raise ConfigError("load_many needs at least one adapter and its name, e.g. {'arid': 'runs/arid'}")
    model = load_adapter(Path(next(iter(paths.values()))), device, weights=weights)
    for name, path in paths.items():
        model.add_adapter(name, read_adapter(path))
    return model


def read_adapter(path: str | Path) -> Adapter:
    """Read a run folder or an adapter folder, to hand it to ``model.add_adapter(name, adapter)``.

    Raises:
        CheckpointError: no such folder, or its files cannot be read.
    """
    from cegate import adapter_folder

    return adapter_folder.read_adapter(Path(path))
