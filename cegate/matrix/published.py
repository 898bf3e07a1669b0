"""Numbers of the CrossEarth-Gate and CrossEarth papers, to stand beside measured ones; they are in published.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

import yaml

LABEL = "paper, DINOv2-L"
NOTE = (
    f"{LABEL}: published with DINOv2-L, one figure per entry without seeds. rein and crossearth are of "
    "arXiv:2410.22629, which does not say which evaluation counts; the others are of arXiv:2511.20302, and by the "
    "protocol of the benchmark the best evaluation on the target. The two papers' figures on RescueNet lie too far "
    "apart to be of one label map and protocol. What is measured here is the last evaluation, or the best on source "
    "labels where there is a validation set."
)


class Group(NamedTuple):
    """Settings that are averaged over."""

    name: str
    settings: tuple[str, ...]
    miou: Mapping[str, float]
    """Method -> mIoU in percent, where the paper has it."""


_NUMBERS = yaml.safe_load((resources.files("cegate.matrix") / "published.yaml").read_text(encoding="utf-8"))
SETTINGS: Mapping[str, Mapping[str, float]] = _NUMBERS["settings"]
"""Setting -> method -> mIoU."""
GROUPS = tuple(Group(name, tuple(group["settings"]), group["miou"]) for name, group in _NUMBERS["groups"].items())
"""Averages of the paper's tables and of its ablation."""
