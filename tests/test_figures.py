from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from cegate.data.datasets import Item
from cegate.figures import draw_curves, draw_gate, draw_panels

PALETTE = ("#E69F00", "#009E73")


def sites_of(layers: int) -> list[str]:
    return [f"{kind}.{layer}" for kind in ("spatial", "semantic", "frequency") for layer in range(layers)]


def colour_share(picture: np.ndarray, colour: str) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(picture[..., :3] - wanted).max(-1) < 0.02).mean())


@pytest.mark.parametrize(("layers", "rounds"), [(6, 1), (24, 40)])
def test_the_heat_map_marks_what_was_chosen(tmp_path, layers, rounds):
    sites, rng = sites_of(layers), np.random.default_rng(0)
    shares = []
    for count in (1, layers):
        scores = [dict(zip(sites, rng.random(len(sites)).tolist(), strict=True)) for _ in range(rounds)]
        records = [{"iteration": 100 * i, "scores": s, "active": sites[:count]} for i, s in enumerate(scores)]
        draw_gate(records, sites, tmp_path / "gate.png")
        shares.append(colour_share(matplotlib.image.imread(tmp_path / "gate.png"), "#D1495B"))
    assert shares[1] > 3 * shares[0] > 0


def test_a_choice_without_scores_is_drawn(tmp_path):
    sites = sites_of(4)
    draw_gate([{"iteration": 0, "scores": {}, "active": sites[:2]}], sites, tmp_path / "gate.png")
    assert colour_share(matplotlib.image.imread(tmp_path / "gate.png"), "#D1495B") > 0


def test_one_kind_and_zero_scores_are_drawn(tmp_path):
    sites = ["semantic.0", "semantic.1"]
    draw_gate([{"iteration": 0, "scores": dict.fromkeys(sites, 0.0), "active": sites}], sites, tmp_path / "gate.png")
    assert (tmp_path / "gate.png").stat().st_size > 0


@pytest.mark.parametrize("evaluated", [True, False])
def test_curves_are_drawn_with_and_without_evaluations(tmp_path, evaluated):
    records = [
        {"iteration": i, "split": "train", "stage": stage, "domain": "source", "loss": 1 / (i + 1)}
        for stage in ("before", "after")
        for i in range(0, 50, 10)
    ]
    if evaluated:
        records += [{"iteration": i, "split": "after", "domain": "arid", "mIoU": m} for i, m in ((10, 0.2), (40, None))]
    draw_curves(records, tmp_path / "figures" / "curves.png")
    assert colour_share(matplotlib.image.imread(tmp_path / "figures/curves.png"), "#0072B2") > 0


@pytest.mark.parametrize(("bands", "height", "width"), [(3, 40, 40), (1, 30, 60), (4, 700, 1200)])
def test_panels_show_the_palette_for_any_bands_and_size(tmp_path, bands, height, width):
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 1
    label[0] = 255
    item = Item(np.full((bands, height, width), 0.5, np.float32), label, "a")
    draw_panels([item, item], {"prediction": [label, 1 - label % 2]}, ("land", "water"), PALETTE, tmp_path / "p.png")
    picture = matplotlib.image.imread(tmp_path / "p.png")
    assert all(colour_share(picture, colour) > 0.1 for colour in PALETTE)
