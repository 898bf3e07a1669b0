from __future__ import annotations

import gc
import multiprocessing
import random
import time

import numpy as np
import pytest
import rasterio
import torch

from cegate.config import AugmentConfig, SetConfig
from cegate.data.datasets import open_set
from cegate.data.stream import EvalStream, TrainStream
from cegate.errors import ConfigError, DataError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def scenes():
    return open_set(SetConfig(kind="generated", split="temperate", limit=5, tile=64), name="source")


def stream(dataset, seed=0, purpose="train", batch_size=3, **keys):
    keys = {"crop": 32, "augment": AugmentConfig(), "mean": MEAN, "std": STD} | keys
    return TrainStream(dataset, batch_size=batch_size, seed=seed, purpose=purpose, **keys)


def same(one, two):
    return one.names == two.names and torch.equal(one.image, two.image) and torch.equal(one.label, two.label)


def test_a_batch_has_the_promised_shapes(scenes):
    batch = stream(scenes).batch(0)
    assert batch.image.shape == (3, 3, 32, 32)
    assert batch.image.dtype == torch.float32
    assert batch.label.shape == (3, 32, 32)
    assert batch.label.dtype == torch.int64
    assert len(batch) == len(batch.names) == 3
    assert set(batch.label.unique().tolist()) <= {0, 1, 2, 3, 4, 255}


def test_a_batch_depends_on_seed_purpose_and_iteration_alone(scenes):
    first = stream(scenes).batch(7)
    source = stream(scenes)
    for iteration in (3, 9, 0):
        source.batch(iteration)
    assert same(source.batch(7), first)
    assert not same(stream(scenes, seed=1).batch(7), first)
    assert not same(stream(scenes, purpose="fisher").batch(7), first)
    assert not same(source.batch(8), first)


def test_samples_of_one_batch_are_drawn_apart():
    one = open_set(SetConfig(kind="generated", split="arid", limit=1, tile=64), name="one")
    image = stream(one).batch(0).image
    assert not torch.equal(image[0], image[1])


def test_every_epoch_takes_every_item_once_in_a_new_order(scenes):
    source = stream(scenes, batch_size=2)
    names = [name for iteration in range(10) for name in source.batch(iteration).names]
    epochs = [names[k : k + 5] for k in range(0, 20, 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_images_are_normalised(scenes):
    cfg = AugmentConfig(resize=[1.0, 1.0], flip=False, photometric=False)
    batch = stream(scenes, crop=64, augment=cfg).batch(0)
    position = [scenes.item_name(k) for k in range(5)].index(batch.names[0])
    expected = (scenes.read(position).image - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(batch.image[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(scenes, workers):
    source = stream(scenes)
    batches = list(source.loader(4, 10, workers))
    assert len(batches) == 6
    assert all(same(batch, source.batch(4 + k)) for k, batch in enumerate(batches))


def test_workers_may_start_from_nothing(scenes):
    source = stream(scenes)
    batches = list(source.loader(0, 2, 1, context="spawn"))
    assert all(same(batch, source.batch(k)) for k, batch in enumerate(batches))


def test_a_resumed_loader_goes_on_where_the_first_stopped(scenes):
    whole = list(stream(scenes).loader(0, 6))
    parts = [*stream(scenes).loader(0, 2), *stream(scenes).loader(2, 6, workers=1)]
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_global_generators_alone(scenes, workers):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    list(stream(scenes).loader(0, 3, workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_a_dropped_loader_takes_its_workers_along(scenes):
    batches = stream(scenes).loader(0, 100_000, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    start = time.monotonic()
    del batches
    gc.collect()
    while multiprocessing.active_children() and time.monotonic() - start < 10:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_stops_the_loader_with_one_line(tmp_path, workers):
    for folder, bands in (("images", 3), ("masks", 1)):
        (tmp_path / folder).mkdir()
        profile = {"driver": "PNG", "height": 16, "width": 16, "count": bands, "dtype": "uint8"}
        with rasterio.open(tmp_path / folder / "a.png", "w", **profile) as dst:
            dst.write(np.full((bands, 16, 16), 9, np.uint8))
    data = open_set(SetConfig(root=str(tmp_path)), name="bad", classes=("a", "b"))
    with pytest.raises(DataError, match=r"^.*masks/a\.png: mask values outside the label map: 9 \(256 px\)") as caught:
        list(stream(data).loader(0, 2, workers))
    assert "\n" not in str(caught.value)


def test_an_evaluation_reads_whole_images_in_order(scenes):
    source = EvalStream(scenes, mean=MEAN, std=STD)
    batches = list(source)
    assert len(source) == len(batches) == 5
    for index, batch in enumerate(batches):
        item = scenes.read(index)
        assert batch.names == [item.name]
        assert batch.image.shape == (1, 3, 64, 64)
        assert (batch.label[0].numpy() == item.label).all()
    assert all(same(a, b) for a, b in zip(batches[2:4], source.loader(2, 4, workers=1), strict=True))


def test_a_batch_moves_whole(scenes, device):
    batch = stream(scenes).batch(0).to(device)
    assert batch.image.device.type == batch.label.device.type == device.type
    assert len(batch.names) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"batch_size": 0}, r"data\.batch_size=0"), ({"crop": 0}, r"data\.crop=0"),
     ({"augment": AugmentConfig(resize=[2.0, 0.5])}, r"data\.augment\.resize=\[2\.0, 0\.5\]"),
     ({"mean": (0.5,)}, "has 3 bands .* but mean has 1 and std 3 values")],
)  # fmt: skip
def test_wrong_settings_are_named(scenes, keys, message):
    with pytest.raises(ConfigError, match=message):
        stream(scenes, **keys)


def test_what_lies_beside_a_small_picture_is_the_mean_colour():
    small = open_set(SetConfig(kind="generated", split="temperate", limit=2, tile=20), name="source")
    batch = stream(small, augment=AugmentConfig(resize=[1.0, 1.0], photometric=False)).batch(0)
    assert (batch.label[:, 20:] == 255).all() and (batch.label[:, :, 20:] == 255).all()
    assert (batch.image[:, :, 20:] == 0).all() and (batch.image[:, :, :, 20:] == 0).all()
    assert batch.image[:, :, :20, :20].abs().min() > 0
