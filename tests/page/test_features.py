"""Pictures of features: what they are of, and what a page says where they cannot be made."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cegate.backbone.vit import weight_hash
from cegate.checkpoint import State, save_state, trained_weights
from cegate.page.features import NO_UMAP, Sample, choose_points, features_part, principal_colours
from cegate.page.reading import read_runs
from cegate.page.writing import render_page
from cegate.runfolder import RunFolder
from cegate.segmenter import build


@pytest.fixture
def run(make_run):
    path = make_run()
    config = RunFolder(path).config()
    segmenter = build(config)
    state = {"stage": "after", "iteration": 600, "trained": trained_weights(segmenter), "ever_active": []}
    hashes = {"backbone_sha256": weight_hash(segmenter.vit), "classes": list(segmenter.classes)}
    (path / "checkpoints").mkdir(exist_ok=True)
    save_state(path / "checkpoints/best.pt", State(**state, active=[], frozen=[], **hashes, value_range=[[0, 255]] * 3))
    return read_runs([path])[0], config


def test_colours_are_principal_components():
    """Tokens of two directions at right angles, one much longer, and a third far shorter."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0][:, :3]
    along = rng.uniform(-1, 1, size=(2, 20, 20, 3)) * (9, 3, 0.5)
    shown = principal_colours(list(along @ basis.T + 4))
    assert [picture.shape for picture in shown] == [(20, 20, 3)] * 2
    for axis in range(3):
        ranks = [np.stack(parts)[..., axis].ravel() for parts in (shown, along)]
        assert abs(np.corrcoef(*ranks)[0, 1]) > 0.98
    assert min(picture.min() for picture in shown) == 0 and max(picture.max() for picture in shown) == 1


def test_points_are_of_every_class_and_domain_once_each(monkeypatch):
    monkeypatch.setattr("cegate.page.features.POINTS", 5)
    tokens = np.arange(32.0).reshape(4, 8, 1)
    labels = np.full((4, 8), 255)
    labels[0], labels[1, :3] = 0, 2
    chosen = choose_points([Sample("a", None, tokens, labels), Sample("b", None, tokens + 100, labels)], 3)
    assert {key: len(points) for key, points in chosen.items()} == {
        **{("a", 0): 5, ("a", 2): 3, ("b", 0): 5},
        ("b", 2): 3,
    }
    assert chosen["a", 2].ravel().tolist() == [8, 9, 10]
    assert len(set(chosen["b", 0].ravel())) == 5 and set(chosen["b", 0].ravel()) <= set(range(100, 108))


def test_a_page_shows_features_and_says_what_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    page = render_page([run[0]], run[1], tiles=0, features=True)
    assert 'href="#features"' in page and "pip install &#39;cegate[pictures]&#39;" in page
    assert page.count('alt="Features of ') == 2 * 3  # validation and arid
    assert "Features" not in render_page([run[0]], run[1], tiles=0)


def test_with_umap_all_chosen_patches_lie_on_the_map(run, monkeypatch):
    seen = []

    def fit(self, features):
        seen.append(features)
        return np.asarray(features[:, :2])

    umap = SimpleNamespace(UMAP=type("UMAP", (), {"__init__": lambda self, **options: None, "fit_transform": fit}))
    monkeypatch.setitem(sys.modules, "umap", umap)
    monkeypatch.setattr("cegate.page.features.svg_uri", lambda figure: "data:map")
    part = features_part(*run)
    assert part["map"] == "data:map" and part["problems"] == []
    (points,) = seen
    assert points.ndim == 2 and points.shape[1] == build(run[1]).backbone.width and np.isfinite(points).all()


def test_data_that_is_gone_is_said(run):
    part = features_part(run[0], SimpleNamespace(run=SimpleNamespace(device="cuda:99", precision="fp32")))
    assert part["tiles"] == [] and part["problems"][0].startswith("No pictures of features: ")
    assert NO_UMAP not in part["problems"] and not torch.cuda.is_available()
