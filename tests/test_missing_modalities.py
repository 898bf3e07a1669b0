"""The script that measures what a missing modality costs, without the models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio

from cegate.config import Config, DataConfig, SecondConfig, SetConfig

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/missing_modalities.py"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("missing_modalities", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def target(tmp_path):
    (tmp_path / "dsm").mkdir()
    for number in range(2):
        heights = np.random.default_rng(number).integers(0, 256, (1, 300, 330), np.uint8)
        with rasterio.open(
            tmp_path / f"dsm/{number}.png", "w", driver="PNG", count=1, height=300, width=330, dtype="uint8"
        ) as out:
            out.write(heights)
    return SetConfig(root=str(tmp_path), second=SecondConfig(images="dsm/*.png"))


def test_a_third_of_the_heights_becomes_nodata_and_the_rest_stays(script, target, tmp_path):
    holed = script.with_holes(target, tmp_path / "holes")
    for number in range(2):
        with (
            rasterio.open(tmp_path / f"dsm/{number}.png") as src,
            rasterio.open(Path(holed.second.images).with_name(f"{number}.tif")) as dst,
        ):
            before, after = src.read(1).astype(int), dst.read(1)
            assert dst.nodata == script.HOLE
        hidden = after == script.HOLE
        assert 0.15 < hidden.mean() < 0.55 and hidden[:32, :32].all() == hidden[0, 0]
        np.testing.assert_array_equal(after[~hidden], before[~hidden])
    again = script.with_holes(target, tmp_path / "again")
    assert rasterio.open(Path(again.second.images).with_name("0.tif")).read().tobytes() == (
        rasterio.open(Path(holed.second.images).with_name("0.tif")).read().tobytes()
    )


def test_each_condition_has_its_column(script, target, tmp_path, monkeypatch):
    def measured(run, config, without=()):
        holed = config.data.targets["t"].second is not None and config.data.targets["t"].second.images[0] == "/"
        scores = {"t": 0.5 if holed else 0.7, "t_without_second": 0.3, "t_without_image": 0.2}
        return [
            SimpleNamespace(domain=domain, scores=SimpleNamespace(mIoU=score))
            for domain, score in scores.items()
            if domain == "t" or domain.rpartition("_")[2] in without
        ]

    monkeypatch.setattr(script, "evaluate_run", measured)
    both = Config(data=DataConfig(source=target, targets={"t": target}))
    assert script.measure(None, both, tmp_path / "holes") == pytest.approx([70, 30, 20, 50])
    one = SetConfig(root=target.root)
    assert script.measure(None, Config(data=DataConfig(source=one, targets={"t": one})), tmp_path) == [70]
