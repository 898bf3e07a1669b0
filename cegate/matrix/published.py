"""Numbers of the CrossEarth-Gate paper (arXiv:2511.20302, DINOv2-L), to stand beside measured ones. mIoU in percent.

They are the best target mIoU over the evaluations of a run, from code that is not public; the RescueNet figures sit far
above CrossEarth's for settings of the same name, so that label map or test protocol must differ there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from cegate.config import Method

LABEL = "paper, DINOv2-L"
NOTE = (
    f"{LABEL}: published in arXiv:2511.20302 with DINOv2-L, one figure per entry without seeds; by the protocol of the "
    "benchmark it is the best evaluation on the target. What is measured here is the last evaluation, or the best on "
    "source labels where there is a validation set."
)

SETTINGS: dict[str, dict[Method, float]] = {
    "dg/casid_sub2tem": {"gate": 50.1, "frozen": 43.1},
    "dg/casid_sub2tms": {"gate": 66.6, "frozen": 63.4},
    "dg/casid_sub2trf": {"gate": 65.2, "frozen": 58.8},
    "dg/casid_tem2sub": {"gate": 68.0},
    "dg/casid_tem2tms": {"gate": 67.0},
    "dg/casid_tem2trf": {"gate": 60.3},
    "dg/p_r2res": {"gate": 60.1, "frozen": 54.2},
    "dg/p_i2res": {"gate": 58.6, "frozen": 54.2},
    "da/p2v": {"gate": 68.2, "frozen": 66.1},
    "da/v2p": {"gate": 62.4, "frozen": 59.2},
    "da/r2u": {"gate": 56.5, "frozen": 54.9},
    "da/u2r": {"gate": 49.1, "frozen": 45.5},
}
"""Setting -> method -> mIoU."""


@dataclass(frozen=True)
class Group:
    """Settings that the paper averages over."""

    name: str
    settings: tuple[str, ...]
    miou: dict[Method, float]


def _casid(source: str) -> tuple[str, ...]:
    return tuple(f"dg/casid_{a}2{b}" for a, b in permutations(("sub", "tem", "tms", "trf"), 2) if a == source)


GROUPS: tuple[Group, ...] = (
    Group(
        "CASID Sub",
        _casid("sub"),
        {"frozen": 55.2, "lora": 57.2, "adaptformer": 56.1, "earth_adapter": 56.8, "gate": 60.6, "full": 59.0},
    ),
    Group(
        "CASID Tem",
        _casid("tem"),
        {"frozen": 63.6, "lora": 64.0, "adaptformer": 64.1, "earth_adapter": 64.5, "gate": 65.1},
    ),
    Group(
        "CASID Tms",
        _casid("tms"),
        {"frozen": 54.4, "lora": 54.5, "adaptformer": 58.0, "earth_adapter": 56.2, "gate": 59.3},
    ),
    Group(
        "CASID Trf",
        _casid("trf"),
        {"frozen": 59.2, "lora": 59.8, "adaptformer": 61.8, "earth_adapter": 60.6, "gate": 62.4},
    ),
    Group(
        "CASID, four sources",
        tuple(name for source in ("sub", "tem", "tms", "trf") for name in _casid(source)),
        {"gate": 61.9, "no_spatial": 60.5, "no_semantic": 60.4, "no_frequency": 60.4, "all_on": 59.6},
    ),
    Group("RescueNet", ("dg/p_r2res", "dg/p_i2res"), {"full": 26.7}),
    Group(
        "Domain adaptation",
        ("da/p2v", "da/v2p", "da/r2u", "da/u2r"),
        {"frozen": 56.4, "lora": 57.6, "adaptformer": 57.7, "earth_adapter": 58.1, "gate": 59.1, "full": 50.1},
    ),
)
"""Averages of the paper's tables and of its ablation."""
