from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from cegate.data import encoders
from cegate.scenes.sink import ClassArray, Result, ShareArray, begin_copy, open_mask_file

PALETTE = ("#102030", "#FFFFFF", "#00FF00")


def rows_of(sink, logits, empty=None, step=7):
    """What a sink keeps of logits [K, H, W], in parts of some rows."""
    for first in range(0, logits.shape[1], step):
        place = slice(first, min(first + step, logits.shape[1]))
        values = begin_copy(sink.keep(logits[:, place]))()
        yield Result(place, values, None if empty is None else empty[place])


@pytest.fixture
def result():
    logits, empty = torch.randn(3, 40, 25), np.random.default_rng(0).random((40, 25)) < 0.25
    return logits, empty, np.where(empty, 255, logits.argmax(0)).astype(np.uint8)


def test_arrays_hold_classes_and_shares(result):
    logits, empty, classes = result
    found, shares = ClassArray((40, 25)), ShareArray(3, (40, 25))
    for sink in (found, shares):
        for rows in rows_of(sink, logits, empty):
            sink.write(rows)
    np.testing.assert_array_equal(found.array, classes)
    np.testing.assert_allclose(shares.array, np.where(empty, np.nan, logits.softmax(0)), rtol=1e-6)


@pytest.mark.parametrize("step", [1, 7, 100])
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_file_holds_classes_colours_and_place(result, write_scene, tmp_path, suffix, step):
    logits, empty, classes = result
    scene, path = write_scene("scene.tif", np.zeros((3, 40, 25), np.uint8)), tmp_path / f"mask{suffix}"
    with open_mask_file(path, (40, 25), like=scene, palette=PALETTE) as sink:
        for rows in rows_of(sink, logits, empty, step):
            sink.write(rows)
        assert not path.exists(), "it is not whole yet"
    assert sink.without_data == empty.mean()
    with rasterio.open(path) as mask, rasterio.open(scene) as src:
        np.testing.assert_array_equal(mask.read(1), classes)
        assert [mask.colormap(1)[k][:3] for k in (0, 1, 255)] == [(16, 32, 48), (255, 255, 255), (0, 0, 0)]
        if suffix == ".tif":
            assert (mask.crs, mask.transform, mask.nodata) == (src.crs, src.transform, 255)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_file_that_fails_half_way_leaves_the_older_one(result, tmp_path, suffix):
    path = tmp_path / f"mask{suffix}"
    path.write_bytes(b"older")

    def write_a_part():
        with open_mask_file(path, (40, 25)) as sink:
            sink.write(next(rows_of(sink, *result[:2])))
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_a_part()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: b"older"}


@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
@pytest.mark.parametrize("size", [(1, 1), (513, 1030), (1100, 600), (600, 37), (37, 1500)], ids=str)
def test_gdal_reads_what_is_written_in_tiles_and_strips(tmp_path, size, big, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 3, size, dtype=np.uint8)
    if big:  # as an image of 2 GiB is
        monkeypatch.setattr(encoders.TiffWriter, "BIG_PX", 0)
    with (tmp_path / "mask.tif").open("wb") as file:
        tags = {258: encoders.Tag(3, b"\x08\0"), 259: encoders.Tag(3, b"\x08\0"), 262: encoders.Tag(3, b"\x01\0")}
        writer = encoders.TiffWriter(file, size, tags)
        for first in range(0, size[0], 100):
            writer.write(pixels[first : first + 100])
        writer.close()
    assert (tmp_path / "mask.tif").read_bytes()[2] == (43 if big else 42)
    with rasterio.open(tmp_path / "mask.tif") as mask:
        np.testing.assert_array_equal(mask.read(1), pixels)
        assert mask.is_tiled == (min(size) > 512)


def test_blocks_deflated_in_threads_make_the_same_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 3, (1100, 1600), dtype=np.uint8)
    with ThreadPoolExecutor(3) as threads:
        for name, each in (("one", map), ("three", threads.map)):
            with (tmp_path / name).open("wb") as file:
                writer = encoders.TiffWriter(file, pixels.shape, {}, each)
                writer.write(pixels)
                writer.close()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_what_is_held_does_not_grow_with_the_height(tmp_path, suffix):
    import tracemalloc

    def peak(height: int) -> int:
        rows = Result(slice(0, 256), np.zeros((256, 600), np.uint8))
        with open_mask_file(Path(tmp_path / f"{height}{suffix}"), (height, 600)) as sink:
            sink.write(rows)
            tracemalloc.start()
            for _ in range(height // 256 - 1):
                sink.write(rows)
            held = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return held

    low, high = peak(2048), peak(16384)
    # as many blocks are being deflated at once as the moment allows, half a megabyte each
    assert high < low + (1 << 20) < 16384 * 600 / 2
