"""Numbers of the MFNet paper (arXiv:2410.11160, IEEE TGRS 2025), to stand beside measured ones. Percent.

They are the best test figures over the epochs of one run. Means leave clutter out on Vaihingen and Potsdam.
"""

from __future__ import annotations

from typing import NamedTuple

LABEL = "paper, SAM"
"""Begins the title of a column, which ends with the encoder's size."""
NOTE = (
    f"{LABEL}: published in arXiv:2410.11160, one figure per entry without seeds, the best evaluation on the test "
    "set over all epochs. Its encoder ran without relative positions, which its code never loads "
    "(model.official_relpos). What is measured here is the last evaluation."
)


class Row(NamedTuple):
    """What a method reached on a set."""

    OA: float
    mF1: float
    mIoU: float
    recall: tuple[float, ...] = ()
    """Of each class, in the order of `CLASSES`."""


CLASSES = {
    "mfnet/vaihingen": ("building", "tree", "low_vegetation", "car", "impervious_surface"),
    "mfnet/potsdam": ("building", "tree", "low_vegetation", "car", "impervious_surface"),
    "mfnet/mmhunan": ("cropland", "forest", "grassland", "wetland", "water", "unused_land", "built_up_area"),
}
"""The paper's order of its recall columns."""

SETTINGS: dict[str, dict[str, dict[str, Row]]] = {
    "mfnet/vaihingen": {
        "mfnet_lora": {
            "samvit_base_patch16": Row(91.93, 89.89, 82.09, (97.83, 94.26, 77.82, 85.43, 91.98)),
            "samvit_large_patch16": Row(92.22, 91.09, 83.96, (96.85, 92.89, 81.09, 89.95, 93.28)),
            "samvit_huge_patch16": Row(92.73, 91.50, 84.66, (97.98, 92.35, 82.96, 90.09, 93.25)),
        },
        "mfnet_adapter": {
            "samvit_base_patch16": Row(92.62, 90.60, 83.24, (98.73, 91.41, 83.09, 85.63, 92.91)),
            "samvit_large_patch16": Row(92.93, 91.51, 84.72, (98.84, 93.17, 81.16, 89.23, 93.39)),
            "samvit_huge_patch16": Row(92.97, 91.71, 85.03, (98.38, 93.94, 80.70, 90.47, 93.59)),
        },
        "mfnet_lora_single": {"samvit_large_patch16": Row(92.00, 90.35, 82.74)},
        "mfnet_adapter_single": {"samvit_large_patch16": Row(92.02, 90.94, 83.69)},
        "frozen": {"samvit_large_patch16": Row(88.01, 85.34, 75.11)},
    },
    "mfnet/potsdam": {
        "mfnet_lora": {
            "samvit_base_patch16": Row(90.57, 91.48, 84.61, (97.60, 86.45, 87.87, 94.39, 92.44)),
            "samvit_large_patch16": Row(90.99, 92.13, 85.71, (97.59, 88.57, 88.34, 96.35, 92.68)),
            "samvit_huge_patch16": Row(91.43, 92.49, 86.34, (98.19, 87.30, 89.89, 96.27, 92.80)),
        },
        "mfnet_adapter": {
            "samvit_base_patch16": Row(90.89, 91.79, 85.14, (97.93, 87.13, 87.72, 95.68, 92.68)),
            "samvit_large_patch16": Row(91.62, 92.51, 86.37, (98.31, 88.78, 87.27, 96.29, 93.69)),
            "samvit_huge_patch16": Row(91.71, 92.70, 86.69, (98.44, 87.37, 90.36, 96.24, 93.17)),
        },
    },
    "mfnet/mmhunan": {
        # the paper's row of MMLoRA on ViT-L is that of FTransDeepLab, digit for digit, and is left out
        "mfnet_lora": {
            "samvit_base_patch16": Row(79.35, 58.79, 46.54, (76.83, 90.69, 24.16, 22.03, 80.17, 78.12, 29.66)),
            "samvit_huge_patch16": Row(78.87, 60.38, 47.63, (76.42, 90.65, 38.08, 20.78, 74.48, 77.93, 38.69)),
        },
        "mfnet_adapter": {
            "samvit_base_patch16": Row(80.68, 62.10, 49.20, (74.81, 91.47, 27.59, 25.00, 86.47, 78.92, 37.46)),
            "samvit_large_patch16": Row(80.93, 65.33, 51.82, (79.19, 89.52, 46.07, 42.23, 81.15, 77.58, 39.65)),
            "samvit_huge_patch16": Row(81.07, 64.13, 51.08, (79.66, 90.06, 42.61, 38.81, 80.31, 78.92, 40.04)),
        },
    },
}
"""Setting -> method -> backbone -> figures. MMHunan's unused land and built-up area are probably exchanged."""


SIZES = {"samvit_base_patch16": "ViT-B", "samvit_large_patch16": "ViT-L", "samvit_huge_patch16": "ViT-H"}


def column(setting: str, backbone: str) -> tuple[str, dict[str, float]]:
    """What stands beside measured figures of a setting: a title, and method -> mIoU, with that backbone, or with ViT-L
    where the paper does not have it."""
    backbone = backbone if backbone in SIZES else "samvit_large_patch16"
    rows = {method: of[backbone] for method, of in SETTINGS[setting].items() if backbone in of}
    return f"{LABEL} {SIZES[backbone]}", {method: row.mIoU for method, row in rows.items()}
