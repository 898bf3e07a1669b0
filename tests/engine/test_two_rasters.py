"""Two rasters from a configuration to a map: training, resume, what is shared, prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cegate
from cegate.checkpoint import load_checkpoint, load_state
from cegate.configfile import read_config
from cegate.engine.stage import Stage
from cegate.engine.trainer import train
from cegate.runfolder import RunFolder
from tests.conftest import SMALL

pytestmark = pytest.mark.usefixtures("no_figures")
METHODS = ("mfnet_lora", "mfnet_adapter", "mfnet_gate", "mfnet_lora_single", "mfnet_adapter_single")


@pytest.fixture
def two(tmp_path):
    """Configuration of a run of seconds on generated scenes with heights."""

    def make(method: str = "mfnet_lora", folder: str = "run", **changes: object):
        data = SMALL["data"]
        sets = {name: data[name] | {"second": {"scale": "tile"}} for name in ("source", "validation")}
        mapping = SMALL | {
            "run": SMALL["run"] | {"method": method, "work_dir": str(tmp_path / folder)},
            "data": data | sets | {"targets": {}},
            "model": SMALL["model"] | {"head": "unetformer"},
            "train": SMALL["train"] | {"iterations": 3, "eval_every": 3, "checkpoint_every": 1},
            "gate": {key: value for key, value in SMALL["gate"].items() if key != "method"},
        }
        overrides = [(key.replace("__", "."), str(value)) for key, value in changes.items()]
        return read_config(mapping, overrides, training=True)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_bit_by_bit_and_what_it_shares_is_the_model(two, method, monkeypatch):
    changes = {} if "single" in method else {"modal__dropout": 0.5}
    whole = train(two(method, "whole", **changes)).path
    config, step = two(method, "cut", **changes), Stage.step

    def step_until(self, data):
        if self.iteration == 2:
            raise RuntimeError("power cut")
        return step(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "step", step_until)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    cut = train(config, resume=True).path
    a, b = (load_state(path / "checkpoints/last.pt") for path in (whole, cut))
    assert all(torch.equal(a.trained[key], b.trained[key]) for key in a.trained)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name

    shared, saved = cegate.load(cut), load_checkpoint(RunFolder(cut), "best", read_config(cut / "config.yaml"), "cpu")
    bands = 3 if "single" in method else 4
    images = torch.randn(2, bands, 40, 33)
    images[0, 3:, 5:9] = torch.nan
    assert torch.equal(shared(images), saved(images))
    assert shared.recipe == saved.recipe
