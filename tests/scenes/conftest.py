from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

import cegate
from cegate.scenes import mosaic, predictor
from cegate.scenes.beside import Behind
from cegate.segmenter import Segmenter

SECTIONS = {
    "data": {"classes": ["background", "building", "forest", "road", "water"], "crop": 32},
    "model": {"weights": "none"},
    "toolbox": {"spatial": {"rank": 2}, "semantic": {"width": 4}, "frequency": {"width": 2}},
}


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """A small model whose classes vary over an image, with sites of all kinds at work."""
    sites = ["spatial.2", "semantic.1", "semantic.3", "frequency.5", "frequency.7"]
    model = cegate.build({**SECTIONS, "gate": {"method": "fixed", "k": 5, "sites": sites}})
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.head.classifier.weight.normal_(generator=random)
        for weight in model.toolbox.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=random))
    return model.eval()


@pytest.fixture
def write_scene(tmp_path: Path) -> Callable[..., Path]:
    """Writes pixels [C, H, W] as a GeoTIFF in Germany, and returns its path."""

    def write(name: str, pixels: np.ndarray, **profile: object) -> Path:
        bands, height, width = pixels.shape
        place = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 0.5, 0.5)}
        size = {"count": bands, "height": height, "width": width, "dtype": str(pixels.dtype)}
        with rasterio.open(tmp_path / name, "w", driver="GTiff", **size, **place, **profile) as out:
            out.write(pixels)
        return tmp_path / name

    return write


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """In its block reading, model and writing go one after the other in one thread."""

    @contextmanager
    def one_by_one(make: Callable, parts: list) -> Iterator[Iterator]:
        yield map(make, parts)

    class AtOnce(Behind):
        def __call__(self, function: Callable) -> None:
            function()

    @contextmanager
    def in_turn() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(mosaic, "ahead", one_by_one)
            patched.setattr(predictor, "Behind", AtOnce)
            yield

    return in_turn
