"""Runs and adapters that an earlier version wrote (at commit e7bbe84): they load, give the same logits, and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cegate
from cegate import train

FOLDER = Path(__file__).parent / "old_runs"
ADAPTERS = ["gate", "frozen_sites", "rein", "learnable", "dacs"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_logits_and_the_mask_it_gave(name):
    segmenter = cegate.load(FOLDER / name, "cpu")
    with np.load(FOLDER / "logits.npz") as file:
        logits, mask = file[name], file[f"{name}.mask"]
    ramp = torch.from_numpy(np.linspace(-2, 2, 3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64)).sin()
    with torch.no_grad():
        found = segmenter(ramp)[..., ::4, ::4]
    torch.testing.assert_close(found, torch.from_numpy(logits), rtol=1e-4, atol=1e-4)
    image = np.random.default_rng(5).integers(0, 255, (3, 80, 72), np.uint8)
    assert (segmenter.predict(image, blend="none") == mask).mean() > 0.999  # rounding may decide a tie


@pytest.mark.parametrize("name", ["gate", "rein", "dacs"])
def test_an_unfinished_run_goes_on_to_the_same_losses_and_gates(name, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FOLDER / f"unfinished_{name}", run)
    then = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gates = [json.loads(line)["active"] for line in (run / "gates.jsonl").read_text().splitlines()]
    config = run / "config.yaml"
    assert train.main(["--config", str(config), "--run.work_dir", str(run), "--resume"]) == 0
    now = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["split"], r["iteration"], r["domain"]) for r in now] == [
        (r["split"], r["iteration"], r["domain"]) for r in then
    ]
    for ours, theirs in zip(now, then, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert [json.loads(line)["active"] for line in (run / "gates.jsonl").read_text().splitlines()] == gates
