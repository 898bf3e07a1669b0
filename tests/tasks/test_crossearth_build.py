"""The tasks that a configuration asks for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cegate.data.rasters import Window
from cegate.data.sets import Item
from cegate.errors import CheckpointError, ConfigError
from cegate.style.statistics import StyleStatistics
from cegate.tasks.crossearth import crossearth_tasks
from cegate.tasks.masked_images import MaskedImages
from cegate.tasks.styling import Styling

STYLE = {
    "method": "earth",
    "weights": None,
    "statistics": None,
    "alpha": 0.1,
    "covariance": "full",
    "region": "masked",
    "ratio": 0.1,
    "block": 16,
    "probability": 0.1,
    "draw": "iteration",
    "renormalize": True,
}
MIM = {
    "method": "restore",
    "decoder": "per_level",
    "target": "clean",
    "loss": "mse",
    "ratio": 0.7,
    "block": 16,
    "prompt": "fill",
}


def config(style=None, mim=None, **injector) -> SimpleNamespace:
    return SimpleNamespace(
        style=SimpleNamespace(**STYLE | (style or {})),
        mim=SimpleNamespace(**MIM | (mim or {})),
        injector=SimpleNamespace(**{"method": "none", "at": "outputs"} | injector),
        data=SimpleNamespace(crop=32),
        run=SimpleNamespace(seed=7),
    )


NETWORK = SimpleNamespace(
    backbone=SimpleNamespace(width=8),
    recipe=SimpleNamespace(bands=(1, 2, 3), mean=(0.5,) * 3, std=(0.2,) * 3),
    device=torch.device("cpu"),
)


class Source:
    """Five even images, the n-th of brightness n / 10."""

    name = "source"

    def __len__(self) -> int:
        return 5

    def size(self, index: int) -> tuple[int, int]:
        return 40, 30

    def read(self, index: int, window: Window) -> Item:
        return Item(np.full((3, window.height, window.width), index / 10, np.float32), None, str(index), None)


def test_methods_have_the_tasks_of_their_sections():
    both = crossearth_tasks(config(), NETWORK, Source())
    assert [type(task) for task in both] == [Styling, MaskedImages] and both[1].styling is both[0]
    assert [type(t) for t in crossearth_tasks(config(style={"method": "none"}), NETWORK, Source())] == [MaskedImages]
    assert crossearth_tasks(config({"method": "none"}, {"method": "none"}), NETWORK, Source()) == []
    assert not both[1].separate
    assert crossearth_tasks(config(method="gse", at="blocks"), NETWORK, Source())[1].separate


def test_without_statistics_the_source_is_measured_and_says_so(caplog):
    styling = crossearth_tasks(config(), NETWORK, Source())[0]
    mean, _ = styling.injection.spread
    np.testing.assert_allclose(mean, [0.2] * 3 + [0.0] * 3, atol=1e-6)
    assert "styles are those of the source itself" in caplog.text


def test_what_was_measured_is_kept_in_the_state():
    styling = crossearth_tasks(config(), NETWORK, Source())[0]
    other = Source()
    other.read = lambda index, window: Source.read(other, 9 - index, window)
    again = crossearth_tasks(config(), NETWORK, other)[0]
    assert not np.array_equal(again.injection.spread[0], styling.injection.spread[0])
    again.load_state(styling.state())
    assert torch.equal(again.injection.draw(1, 2, [3]), styling.injection.draw(1, 2, [3]))


def test_equal_seeds_give_equal_decoders_whatever_was_drawn_before():
    first = crossearth_tasks(config(), NETWORK, Source())[1]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    second = crossearth_tasks(config(), NETWORK, Source())[1]
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.decoder.parameters(), second.decoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_settings_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"mim.block=64 is larger than the crop, data.crop=32; use 32 or less"):
        crossearth_tasks(config(mim={"block": 64}), NETWORK, Source())
    with pytest.raises(ConfigError, match=r"style.ratio=1.2 is no share"):
        crossearth_tasks(config(style={"ratio": 1.2}), NETWORK, Source())
    StyleStatistics(np.zeros(100), np.eye(100)).save(tmp_path / "s.npz")
    with pytest.raises(
        CheckpointError, match=r"s.npz is of embeddings of 100 numbers, .*style-stats` without --weights"
    ):
        crossearth_tasks(config(style={"statistics": str(tmp_path / "s.npz")}), NETWORK, Source())
