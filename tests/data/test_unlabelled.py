"""Sets of images alone, and the stream that joins them to a labelled source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cegate.config import IGNORE, AugmentConfig, SetConfig
from cegate.data import sets
from cegate.data.datasets import open_set
from cegate.data.rasters import Window, read_header
from cegate.data.stream import TrainStream
from cegate.data.transforms import draw_class_mask
from cegate.errors import DataError

CLASSES = ("field", "road", "water")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = image.shape
    profile = {"driver": "GTiff" if path.suffix == ".tif" else "PNG", "dtype": image.dtype, "count": count}
    with rasterio.open(path, "w", height=height, width=width, **profile) as file:
        file.write(image)


pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")


@pytest.fixture
def root(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(3):
        write_image(tmp_path / f"images/{number}.png", rng.integers(1, 256, (3, 40, 50), dtype=np.uint8))
    return tmp_path


@pytest.fixture
def no_masks_are_read(monkeypatch):
    """Opening a mask, in any way the sets know of, fails."""

    def refuse(*args: object, **keys: object) -> None:
        raise AssertionError(f"a mask was read: {args}")

    def header_of_image(path: Path):
        return refuse(path) if path.parent.name.startswith("mask") else read_header(path)

    monkeypatch.setattr(sets, "read_mask", refuse)
    monkeypatch.setattr(sets, "read_header", header_of_image)
    for kind in (sets.FileSet, sets.GeneratedSet):
        monkeypatch.setattr(kind, "read_label", refuse)


def stream(dataset, *, batch_size=2, purpose="target", **keys):
    keys = {"crop": 32, "augment": AugmentConfig(), "mean": MEAN, "std": STD, "seed": 0} | keys
    return TrainStream(dataset, batch_size=batch_size, purpose=purpose, **keys)


def use(dataset):
    """Everything that training does with a set."""
    dataset.check()
    dataset.fingerprint()
    return stream(dataset).batch(3)


def test_a_folder_needs_no_masks_and_no_classes(root):
    dataset = open_set(SetConfig(root=str(root)), name="unlabelled", labelled=False)
    batch = use(dataset)
    assert len(dataset) == 3 and not dataset.labelled
    assert batch.image.shape == (2, 3, 32, 32) and batch.image.isfinite().all()
    assert (batch.label == IGNORE).all()
    with pytest.raises(DataError, match="masks"):
        open_set(SetConfig(root=str(root)), name="target", classes=CLASSES)


def test_masks_that_are_there_are_never_looked_at(root, no_masks_are_read):
    before = use(open_set(SetConfig(root=str(root)), name="unlabelled", classes=CLASSES, labelled=False))
    for name in ("0.png", "1.png", "surplus.png"):
        (root / "masks").mkdir(exist_ok=True)
        (root / "masks" / name).write_text("no image at all")
    cfg = SetConfig(root=str(root), label_map={"7": "field"})
    dataset = open_set(cfg, name="unlabelled", classes=CLASSES, labelled=False)
    assert torch.equal(use(dataset).image, before.image)
    elsewhere = open_set(replace(cfg, masks="no/*"), name="unlabelled", classes=CLASSES, labelled=False)
    assert dataset.fingerprint() == elsewhere.fingerprint()


@pytest.mark.parametrize("kind", ["loveda", "generated"])
def test_other_kinds_give_their_images_alone(tmp_path, no_masks_are_read, kind):
    for number in range(2):
        write_image(tmp_path / f"Train/Urban/images_png/{number}.png", np.full((3, 40, 40), 90, np.uint8))
    split = {"loveda": "Train/Urban", "generated": "monsoon"}[kind]
    cfg = SetConfig(kind=kind, root=str(tmp_path), split=split, tile=64, limit=2)
    dataset = open_set(cfg, name="unlabelled", classes=CLASSES, labelled=False)  # classes that neither of them has
    assert (use(dataset).label == IGNORE).all()
    assert len(dataset) == 2


def test_images_are_those_of_the_labelled_set(tmp_path):
    cfg = SetConfig(kind="generated", split="arid", limit=2, tile=64)
    bare, whole = open_set(cfg, name="a", labelled=False), open_set(cfg, name="b")
    window = Window(3, 5, 20, 30)
    assert np.array_equal(bare.read(1, window).image, whole.read(1, window).image)
    assert bare.value_range == whole.value_range and bare.item_name(1) == whole.item_name(1)


def test_padding_and_nan_pixels_are_not_valid(tmp_path):
    image = np.random.default_rng(0).random((3, 20, 16), np.float32)
    image[:, :4] = np.nan
    write_image(tmp_path / "images/0.tif", image)
    cfg = SetConfig(root=str(tmp_path), nan="ignore", value_range=[0, 1])
    dataset = open_set(cfg, name="unlabelled", labelled=False)
    plain = AugmentConfig(resize=[1.0, 1.0], flip=False, photometric=False)
    batch = stream(dataset, augment=plain, batch_size=1).batch(0)
    expected = torch.zeros(1, 32, 32, dtype=torch.bool)
    expected[:, 4:20, :16] = True
    assert torch.equal(batch.valid, expected)
    parts = list(stream(dataset, augment=plain, batch_size=3).batch(0).pieces(2))
    assert [len(part) for part in parts] == [2, 1]
    assert all(torch.equal(part.valid[0], expected[0]) for part in parts)


LABELS = arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 5, IGNORE]))


@given(LABELS, st.integers(0, 2**32))
def test_half_of_the_classes_rounded_up_are_pasted_whole(label, seed):
    mask = draw_class_mask(label, np.random.default_rng(seed))
    present = set(np.unique(label)) - {IGNORE}
    chosen = set(np.unique(label[mask]))
    assert len(chosen) == -(-len(present) // 2)
    assert IGNORE not in chosen
    assert np.array_equal(mask, np.isin(label, list(chosen)))


def test_every_class_is_pasted_sooner_or_later():
    label = np.arange(4, dtype=np.uint8).reshape(2, 2)
    masks = np.stack([draw_class_mask(label, np.random.default_rng(seed)) for seed in range(200)])
    assert np.all(masks.mean(0) > 0.35) and np.all(masks.mean(0) < 0.65)
