"""A kind of module in one file: registered, then trained, scored, saved, resumed, loaded and drawn like the others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import cegate
from cegate import sites, train
from cegate.checkpoint import load_state
from cegate.fisher import measure_fisher
from cegate.parts.part import KINDS, PLAIN, Site, site_kind, token_sum, zeros
from cegate.sites import SiteId


class Toy(Site):
    """``a += w * a`` after attention, a factor for each channel."""

    def __init__(self, site: SiteId, width: int) -> None:
        super().__init__(site)
        self.factor = zeros(width)

    @classmethod
    def build(cls, site, backbone, config):
        return cls(site, backbone.width)

    def plugs(self, use=PLAIN):
        return [self.plug("attention", self.scale, use)]

    def scale(self, use, a, tokens):
        (factor,) = self.operands(use, "factor")

        def backward(a, dy):
            use.tap.direct(self.site, "factor", token_sum(a * dy))
            return dy * factor

        return self.run(use, a, a, lambda a, base: base + a * factor, backward)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """As ``@site_kind("toy")`` on the class does, for the tests of this file alone."""
    monkeypatch.setattr(sites, "_KINDS", dict(sites._KINDS))
    monkeypatch.setitem(KINDS, "toy", Toy)
    site_kind("toy")(Toy)


CONFIG = {
    "data": {
        "classes": ["background", "building", "forest", "road", "water"],
        "source": {"kind": "generated", "split": "temperate", "limit": 4, "tile": 48},
        "targets": {"arid": {"kind": "generated", "split": "arid", "limit": 1, "tile": 32}},
        "crop": 32,
        "batch_size": 2,
        "workers": 0,
    },
    "model": {"weights": "none"},
    "toolbox": {"kinds": ["semantic", "toy"], "semantic": {"width": 2}},
    "gate": {"k": 9, "interval": 2, "samples": 2},  # nine of sixteen sites: a toy is among them
    "train": {"iterations": 4, "lr": 1e-2, "eval_every": 4, "log_every": 1, "checkpoint_every": 2},
}


def test_its_scores_are_those_of_single_samples():
    model = cegate.build(CONFIG).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(0, 5, (2, 32, 32))
    probe = type("Probe", (), {"image": images, "label": labels})
    found = measure_fisher(model, model.toolbox, [probe], diagonal=True)
    model.eval().toolbox.apply(cegate.gate.GatePlan(model.toolbox.sites))
    for layer in (0, 7):
        weight = model.toolbox.toy[layer].factor
        rows = [torch.autograd.grad(model.loss(images[b : b + 1], labels[b : b + 1]).sum(), weight) for b in range(2)]
        expected = torch.stack([row[0].square() for row in rows]).mean(0)
        torch.testing.assert_close(found[f"toy.{layer}.factor"], expected, rtol=1e-6, atol=1e-12)


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({**CONFIG, "run": {"work_dir": str(tmp_path / "run"), "name": "toy"}}))
    assert train.main(["--config", str(path)]) == 0
    return path, tmp_path / "run"


def test_it_is_trained_saved_resumed_loaded_and_drawn(run, capsys):
    path, folder = run
    rounds = [json.loads(line) for line in (folder / "gates.jsonl").read_text().splitlines()]
    assert len(rounds[0]["scores"]) == 16
    chosen = [site for site in rounds[-1]["active"] if site.startswith("toy.")]
    assert chosen
    assert (folder / "figures" / "gate.png").stat().st_size > 1000
    segmenter = cegate.load(folder, "cpu")
    assert all(segmenter.toolbox.parameters_of(site)["factor"].abs().sum() > 0 for site in chosen)
    state = load_state(folder / "checkpoints" / "last.pt")
    assert {f"toolbox.{site}.factor" for site in chosen} <= state.trained.keys()
    losses = (folder / "metrics.jsonl").read_text()
    (folder / "checkpoints" / "last.pt").write_bytes((folder / "checkpoints" / "iter_4.pt").read_bytes())
    assert train.main(["--config", str(path), "--resume"]) == 0
    assert (folder / "metrics.jsonl").read_text() == losses
    from cegate import inspect

    assert inspect.main(["--run", str(folder)]) == 0
    assert "toy" in capsys.readouterr().out
    assert isinstance(segmenter.toolbox.toy, nn.ModuleList)
