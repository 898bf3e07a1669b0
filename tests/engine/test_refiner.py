"""Runs with Rein: its own stage, its share of the result, and what a checkpoint of the baseline leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import cegate
from cegate.checkpoint import load_checkpoint, load_state
from cegate.engine.stage import Stage
from cegate.engine.trainer import train
from cegate.runfolder import RunFolder

pytestmark = pytest.mark.usefixtures("no_figures")

REIN = {"run__method": "rein", "refiner__tokens": 5, "refiner__rank": 2, "train__baseline": True}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_baseline_is_the_frozen_backbone_and_the_refiner_learns_after_it(small):
    config = small("rein", **REIN)
    result, frozen = train(config), train(small("frozen", run__method="frozen"))
    before = [r for r in lines(result.path / "metrics.jsonl") if r["split"] == "before"]
    after = [r | {"split": "before"} for r in lines(frozen.path / "metrics.jsonl") if r["split"] == "after"]
    assert before == after
    assert result.after != result.before
    numbers = json.loads((result.path / "result.json").read_text())
    fresh = cegate.build(config)
    assert numbers["trained_parameters"] == sum(p.numel() for p in fresh.refiner.parameters())
    trained = load_state(result.path / "checkpoints/last.pt").trained
    assert all(not torch.equal(trained[f"refiner.{name}"], p) for name, p in fresh.refiner.named_parameters())
    folder = RunFolder(result.path)
    assert not load_checkpoint(folder, str(folder.checkpoints / "before.pt"), config, "cpu").refiner.active
    assert load_checkpoint(folder, "best", config, "cpu").refiner.active


@pytest.mark.parametrize(("stage", "iteration"), [("before", 2), ("after", 0), ("after", 2)])
def test_a_stopped_run_resumes_bit_by_bit(small, monkeypatch, stage, iteration):
    changes = {**REIN, "train__checkpoint_every": 1, "train__iterations": 3}
    step = Stage.step

    def step_until(self, batch):
        if (self.name, self.iteration) == (stage, iteration):
            raise RuntimeError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step_until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(small("cut", **changes))
    cut, whole = train(small("cut", **changes), resume=True).path, train(small("whole", **changes)).path
    for name in ("metrics.jsonl", "gates.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
