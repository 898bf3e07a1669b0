"""env.json: what a run computes with and on, and what of it a resume must find as it was."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import rasterio
import timm
import torch
import yaml

from cegate import __version__, ops
from cegate.checkpoint import State
from cegate.config import Config
from cegate.configfile import changed_values, domain_title, read_config
from cegate.engine.sets import Sets
from cegate.engine.stage import Numerics
from cegate.errors import CheckpointError
from cegate.runfolder import FREE_ON_RESUME, RunFolder

log = logging.getLogger(__name__)


def environment_of(config: Config, sets: Sets, numerics: Numerics, backbone_sha256: str) -> dict[str, Any]:
    """The entries of env.json."""
    device = numerics.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {
            "cegate": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "rasterio": rasterio.__version__,
        },
        "platform": platform.platform(),
        "device": str(device),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "precision": numerics.name,
        "seed": config.run.seed,
        "backends": ops.backends(),
        "backbone_sha256": backbone_sha256,
        "data": {name: {"images": len(data), "fingerprint": data.fingerprint()} for name, data in sets.by_name.items()},
    }


def refuse_changes(
    run: RunFolder, config: Config, sets: Sets, state: State, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Let a run go on from a state only where that gives the numbers of an uninterrupted one.

    Args:
        before, now: env.json as it is, and as it would be written now.

    Raises:
        CheckpointError: the data, the precision or the configuration is another.
    """
    path, recorded = run.path, before.get("data", {})
    changed = [
        name
        for name, data in sets.by_name.items()
        if name in recorded and not data.has_fingerprint(recorded[name]["fingerprint"])
    ]
    if changed:
        raise CheckpointError(
            f"the data of {', '.join(map(domain_title, changed))} is not what {path} was started with; put the "
            "files back or start a run of another name"
        )
    if before["precision"] != now["precision"]:
        raise CheckpointError(
            f"{path} was started with {before['precision']} on {before['gpu'] or before['device']}; "
            f"here run.precision={config.run.precision} is {now['precision']}, which gives other numbers: "
            "go on on such a device, or start a run of another name"
        )
    if other := _changed_keys(state, config):
        raise CheckpointError(
            f"{run.last} is of a run with other values of {', '.join(other)}; put back the checkpoint of this "
            "run, or start a run of another name"
        )
    if now["gpu"] is None and before.get("threads", now["threads"]) != now["threads"]:
        log.warning(
            "the run was started with %d threads and goes on with %d: sums come out in another order, so last "
            "digits differ; set OMP_NUM_THREADS=%d for the same numbers",
            *(before["threads"], now["threads"], before["threads"]),
        )


def _changed_keys(state: State, config: Config) -> list[str]:
    """Keys whose values are not those that a state was made with, but for those that a resume may change."""
    if not state.config:
        return []
    return [
        key for key in changed_values(read_config(yaml.safe_load(state.config)), config) if key not in FREE_ON_RESUME
    ]
