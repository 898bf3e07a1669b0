"""What ``import cegate`` offers: build a model from a configuration, or load one from a run or adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cegate.config import Config
from cegate.configfile import read_config
from cegate.models import segmenter
from cegate.models.segmenter import Segmenter


def build(config: Config | Mapping[str, Any] | str | Path) -> Segmenter:
    """Build a segmenter from a configuration: its sections model, toolbox and gate, and data.classes.

    Args:
        config: a :class:`~cegate.config.Config`, a nested dict, or the path of a YAML file.

    Raises:
        ConfigError: a key is unknown or a value does not fit.
        BackboneError: the backbone cannot be built or its weights do not fit.
    """
    return segmenter.build(config if isinstance(config, Config) else read_config(config))


def load(path: str | Path, device: str | torch.device | None = None) -> Segmenter:
    """Load a run folder or an adapter folder, strictly.

    Args:
        path: folder with ``adapter_config.json``, or a run folder with ``adapter/``.
        device: where to put it; default: a GPU if there is one.

    Raises:
        CheckpointError: no such folder, another backbone, or missing or extra weights.
    """
    from cegate.checkpoint import load_adapter

    return load_adapter(Path(path), device)
