"""Sets of one run: as many bands, one scale of pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio

import cegate
from cegate.config import IGNORE
from cegate.configfile import read_config
from cegate.engine.evaluator import evaluate_run
from cegate.engine.sets import open_sets
from cegate.engine.trainer import train
from cegate.errors import ConfigError
from cegate.runfolder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write_pair(root: Path, low: int, high: int) -> None:
    """One image of 16-bit pixels low..high in three bands, and its mask."""
    pixels = np.random.default_rng(low).integers(low, high, (3, 40, 40)).astype(np.uint16)
    mask = (pixels[0] > (low + high) / 2).astype(np.uint8)
    for name, data in (("images", pixels), ("masks", mask[None])):
        (root / name).mkdir(parents=True)
        profile = {"driver": "GTiff", "height": 40, "width": 40, "count": len(data), "dtype": data.dtype}
        with rasterio.open(root / name / "a.tif", "w", **profile) as dst:
            dst.write(data)


@pytest.fixture
def deep(small, tmp_path):
    """A run on 16-bit images, whose target is twice as bright as the source."""
    for name, low, high in (("source", 100, 2000), ("north", 200, 4000)):
        write_pair(tmp_path / name, low, high)

    def make(**changes):
        sets = {"data__source": f"{{root: {tmp_path / 'source'}}}", "data__validation": "null"}
        sets["data__targets"] = f"{{north: {{root: {tmp_path / 'north'}}}}}"
        return small(**(sets | {"train__iterations": 1, "gate__method": "none", **changes}))

    return make


def test_sets_without_a_range_get_the_sources(deep, tmp_path):
    images = f"{{root: {tmp_path / 'north'}}}"
    config = deep(data__validation=images, data__unlabelled=images, adapt__method="dacs", adapt__warmup=0)
    _, sets = open_sets(config)
    assert sets.source.value_range[0][1] < 2000
    for opened in (sets.validation, *sets.targets, sets.unlabelled):
        assert opened.value_range == sets.source.value_range
    own = deep(data__targets=f"{{north: {{root: {tmp_path / 'north'}, value_range: [0, 5000]}}}}")
    assert open_sets(own)[1].targets[0].value_range == ((0, 5000),) * 3


def test_scores_are_those_of_the_masks_that_predict_gives(deep, tmp_path, no_figures):
    result = train(deep())
    run = RunFolder(result.path)
    (evaluation,) = evaluate_run(run, run.config())
    mask = cegate.load(run.path, "cpu").predict(tmp_path / "north/images/a.tif", blend="none")
    with rasterio.open(tmp_path / "north/masks/a.tif") as src:
        label = src.read(1)
    assert (label != IGNORE).all()
    expected = np.zeros((5, 5), np.int64)
    np.add.at(expected, (label, mask), 1)
    assert np.array_equal(evaluation.confusion.matrix.numpy(), expected)
    assert np.array_equal(np.load(run.eval / "north/confusion.npy"), expected)


def test_other_numbers_of_bands_are_refused_before_anything_is_read(deep, tmp_path):
    nowhere = tmp_path / "nowhere"
    config = deep(
        data__targets=f"{{north: {{root: {nowhere}, bands: [1, 2]}}, south: {{root: {nowhere}, bands: [3, 2, 1]}}}}",
        data__validation=f"{{root: {nowhere}, bands: [1]}}",
        data__unlabelled=f"{{root: {nowhere}, bands: [4, 3]}}",
        adapt__method="dacs",
        adapt__warmup=0,
    )
    with pytest.raises(ConfigError) as error:
        open_sets(config)
    message = str(error.value)
    wrong = "data.validation.bands 1, data.unlabelled.bands 2, data.targets.north.bands 2"
    assert f"data.source.bands has 3 bands, but {wrong} (" in message and "south" not in message


def heights(split: str, **second) -> dict:
    return {"kind": "generated", "split": split, "limit": 1, "tile": 32, "second": second}


def test_bands_of_a_second_raster_are_those_of_the_source_in_every_set():
    data = {"source": heights("arid"), "targets": {"boreal": heights("boreal")}}
    config, sets = open_sets(read_config({"data": data, "run": {"method": "mfnet_adapter"}}))
    assert sets.source.channels == sets.targets[0].channels == (3, 1)
    assert config.data.source.second.bands == config.data.targets["boreal"].second.bands == [1]


def test_a_set_without_the_source_s_second_raster_is_refused():
    bare = {key: value for key, value in heights("boreal").items() if key != "second"}
    config = read_config({"data": {"source": heights("arid"), "targets": {"boreal": bare}}})
    said = r"set 'boreal' gives 3 bands of its images, the source 3 bands of its images and 1 band of a second raster"
    with pytest.raises(ConfigError, match=said):
        open_sets(config)
