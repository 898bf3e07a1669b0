"""`predict` of a GeoTIFF beside the model time of its windows: what reading, writing and the threads cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from models import CLASSES, SIZES, make_segmenter
from rasterio.transform import from_origin
from side_by_side import note, seconds_of

from cegate.recipe import Recipe
from cegate.scenes.files import predict_files
from cegate.scenes.mosaic import Mosaic, windows_at_once
from cegate.scenes.predictor import Predictor

SIDE, CROP, ROUNDS = 4096, 512, 3
WINDOW_S = 0.03
"""A window's time on another device, which leaves this CPU free."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deflated tiles of fields of 64 px with noise."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("scene") / "scene.tif"
    fields = random.integers(0, 200, (3, -(-SIDE // 64), -(-SIDE // 64)), dtype=np.uint8).repeat(64, 1).repeat(64, 2)
    size = {"width": SIDE, "height": SIDE, "count": 3, "dtype": "uint8", "compress": "deflate", "tiled": True}
    place = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 0.5, 0.5)}
    with rasterio.open(path, "w", driver="GTiff", blockxsize=512, blockysize=512, **size, **place) as file:
        file.write(fields[:, :SIDE, :SIDE] + random.integers(0, 20, (3, SIDE, SIDE), dtype=np.uint8))
    return path


class Elsewhere:
    """A model that computes nothing: it waits as long as a device would, and gives the logits that it was given.

    Args:
        fields: side in pixels of the fields in its masks; 1: noise, which takes longest to deflate.
    """

    def __init__(self, recipe: Recipe, fields: int) -> None:
        self.recipe, self.windows = recipe, 0
        logits = torch.randn(len(CLASSES), CROP // fields, CROP // fields, generator=torch.Generator().manual_seed(0))
        self._logits = logits.repeat_interleave(fields, 1).repeat_interleave(fields, 2)

    def predictor(self, *, stride: int | None = None, blend: str = "cosine", tta: str = "none") -> Predictor:
        return Predictor(self._wait, Mosaic(CROP, stride, blend), tta=tta)

    def _wait(self, images: torch.Tensor) -> torch.Tensor:
        self.windows += len(images)
        time.sleep(WINDOW_S * len(images))
        return self._logits.expand(len(images), -1, -1, -1)


def measure(benchmark, scene: Path, segmenter, model_s: Callable[[], float], way: str) -> None:
    """Time a scene; CPU time that the calling thread takes is what a GPU would wait for, besides launches."""
    own = []

    def run() -> None:
        began = time.thread_time()
        list(predict_files(segmenter, {scene: scene.with_name("mask.tif")}, stride=CROP, blend="none"))
        own.append(time.thread_time() - began)

    threads = threading.active_count()
    benchmark.pedantic(run, rounds=ROUNDS, iterations=1, warmup_rounds=0)
    assert threading.active_count() == threads
    wall, model = benchmark.stats.stats.median, model_s()
    note(benchmark.name, f"predict, {way}", f"{wall * 1e3:.0f}", f"{wall / model:.2f} of the next", "< 1.25")
    note(benchmark.name, "model time of its windows", f"{model * 1e3:.0f}")
    note(benchmark.name, "CPU time of the calling thread", f"{sorted(own)[len(own) // 2] * 1e3:.0f}")


@pytest.mark.parametrize("fields", [32, 1], ids=["fields", "noise"])
def bench_predict_with_a_model_elsewhere(benchmark, scene, fields):
    segmenter = Elsewhere(make_segmenter(SIZES["vit_t"]._replace(pixels=CROP)).recipe, fields)
    measure(benchmark, scene, segmenter, lambda: WINDOW_S * segmenter.windows / ROUNDS, f"masks of {fields} px")


def bench_predict_with_vit_tiny(benchmark, scene):
    segmenter = make_segmenter(SIZES["vit_t"]._replace(pixels=CROP)).to(DEVICE).eval()
    through, batch = segmenter.predictor(), windows_at_once(torch.device(DEVICE), CROP)
    images = torch.randn(batch, 3, CROP, CROP, device=DEVICE)

    def model_s() -> float:
        """Of the same windows, from a few."""
        times = sorted(seconds_of(lambda: through._call(images))[0] for _ in range(5))
        return times[2] / batch * (-(-SIDE // CROP)) ** 2

    segmenter.predict(np.zeros((3, CROP, CROP), np.uint8))
    measure(benchmark, scene, segmenter, model_s, "ViT-Tiny")
