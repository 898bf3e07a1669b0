from __future__ import annotations

import errno
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

import cegate
from cegate import cli, predict
from cegate.backbone.vit import weight_hash
from cegate.checkpoint import save_adapter
from cegate.engine.predictor import find_images, plan_outputs, predict_files
from cegate.errors import DataError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 30, 44), dtype=np.uint8)
    place = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 0.5, 0.5)}
    for name, driver, extra in (("a.png", "PNG", {}), ("b.tif", "GTiff", place), ("c.tif", "GTiff", {})):
        with rasterio.open(
            folder / name, "w", driver=driver, count=3, height=30, width=44, dtype="uint8", **extra
        ) as out:
            out.write(pixels)
    return folder


def test_georeferenced_input_gives_a_geotiff_and_the_rest_png(images, small, tmp_path):
    segmenter = cegate.build(small())
    masks = plan_outputs(find_images([str(images)]), tmp_path / "out")
    assert [written.mask.name for written in predict_files(segmenter, masks)] == ["a.png", "b.tif", "c.png"]
    with rasterio.open(images / "b.tif") as src, rasterio.open(tmp_path / "out/b.tif") as mask:
        assert (mask.crs, mask.transform, mask.shape) == (src.crs, src.transform, src.shape)
        assert mask.nodata == 255
        assert np.array_equal(mask.read(1), segmenter.predict(images / "b.tif"))
        assert "#{:02X}{:02X}{:02X}".format(*mask.colormap(1)[1][:3]) == segmenter.palette[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.tif", "c.png"]


def test_one_image_goes_into_the_file_that_is_named(images, small, tmp_path):
    masks = plan_outputs([images / "b.tif"], tmp_path / "mask.png")
    written = list(predict_files(cegate.build(small()), masks))
    assert written == [(tmp_path / "mask.png", images / "b.tif", 0)]
    with pytest.raises(DataError, match="one file for 2 images"):
        plan_outputs([images / "a.png", images / "b.tif"], tmp_path / "mask.png")


def test_inputs_are_files_folders_and_globs_each_once(images):
    assert [path.name for path in find_images([str(images / "*.tif"), str(images)])] == ["b.tif", "c.tif", "a.png"]
    with pytest.raises(DataError, match=r"nowhere\*\.png names no image"):
        find_images([str(images / "nowhere*.png")])


def test_nothing_is_overwritten_unasked(images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"a\.png exists; .*--overwrite"):
        plan_outputs(find_images([str(images)]), tmp_path / "out")
    assert plan_outputs([images / "a.png"], tmp_path / "out", overwrite=True)
    with pytest.raises(DataError, match="would replace the image"):
        plan_outputs(find_images([str(images)]), images, overwrite=True)


def test_a_mask_that_cannot_be_written_leaves_the_older_one(images, small, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.tif").write_bytes(b"older")

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    (images / "aa_broken.png").write_text("no picture")
    masks = plan_outputs([images / "aa_broken.png", images / "b.tif"], tmp_path / "out", overwrite=True)
    with pytest.raises(DataError, match=r"out/b\.tif cannot be written \(No space left on device\).*aa_broken\.png"):
        list(predict_files(cegate.build(small()), masks))
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"older"]


def test_images_of_one_name_are_told_apart(images, tmp_path):
    (images / "deep").mkdir()
    twin = images / "deep" / "a.png"
    twin.write_bytes((images / "a.png").read_bytes())
    with pytest.raises(DataError, match="would both be written to"):
        plan_outputs([images / "a.png", twin], tmp_path / "out")


def test_images_that_cannot_be_used_are_named_after_the_others_are_done(images, small, tmp_path):
    (images / "aa_broken.tif").write_bytes(b"no picture")
    (images / "two_bands.tif").write_bytes(two_bands(images / "b.tif"))
    masks = plan_outputs(find_images([str(images)]), tmp_path / "out")
    told = []
    predicted = predict_files(cegate.build(small()), masks, told.append)
    assert [written.mask.name for written in islice(predicted, 3)] == ["a.png", "b.tif", "c.png"]
    why = r"2 of 5 images have no mask: .*aa_broken\.tif.*two_bands\.tif has 2 bands, the model reads"
    with pytest.raises(DataError, match=why):
        next(predicted)
    assert plan_outputs(find_images([str(images)]), tmp_path / "out", keep=True).keys() == {
        images / "aa_broken.tif",
        images / "two_bands.tif",
    }
    assert told == sorted(told) and {1, 2, 3, 4, 5} <= set(told)


def test_an_image_that_goes_before_its_mask_is_written_stops_no_other(images, small, tmp_path, monkeypatch):
    segmenter = cegate.build(small())
    predict_image = segmenter.predict

    def predict_and_lose(image, **options):
        classes = predict_image(image, **options)
        if image.name == "a.png":
            image.unlink()
        return classes

    monkeypatch.setattr(segmenter, "predict", predict_and_lose)
    predicted = predict_files(segmenter, plan_outputs(find_images([str(images)]), tmp_path / "out"))
    assert [written.mask.name for written in islice(predicted, 2)] == ["b.tif", "c.png"]
    with pytest.raises(DataError, match=r"1 of 3 images have no mask: .*a\.png: no such file"):
        next(predicted)


def two_bands(path: Path) -> bytes:
    with rasterio.open(path) as src, rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", count=2, height=30, width=44, dtype="uint8") as out:
            out.write(src.read([1, 2]))
        return memory.read()


def test_ground_control_points_are_kept(images, small, tmp_path):
    points = [GroundControlPoint(row, column, 10 + column, 50 - row) for row, column in ((0, 0), (0, 44), (30, 0))]
    with (
        rasterio.open(images / "b.tif") as src,
        rasterio.open(
            images / "gcp.tif",
            "w",
            driver="GTiff",
            count=3,
            height=30,
            width=44,
            dtype="uint8",
            gcps=points,
            crs="EPSG:4326",
        ) as out,
    ):
        out.write(src.read())
    (written,) = predict_files(cegate.build(small()), plan_outputs([images / "gcp.tif"], tmp_path / "out"))
    with rasterio.open(written.mask) as mask:
        found, crs = mask.gcps
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
    assert crs == "EPSG:4326"


@pytest.mark.parametrize(("rows", "columns", "share"), [(15, 44, "50.0 %"), (30, 44, "100.0 %"), (1, 1, "under 0.1 %")])
def test_images_without_data_in_places_are_named(images, small, tmp_path, capsys, rows, columns, share):
    with rasterio.open(images / "b.tif", "r+") as image:
        pixels = image.read()
        pixels[:, :rows, :columns] = 255
        image.write(pixels)
        image.nodata = 255
    segmenter = cegate.build(small())
    save_adapter(tmp_path / "adapter", segmenter, weight_hash(segmenter.vit), {})
    options = ["--adapter", tmp_path / "adapter", "--input", images, "--output", tmp_path / "out"]
    assert predict.main([str(option) for option in options]) == cli.GOOD
    said = capsys.readouterr()
    assert f"no data, and 255 in the mask: {share} of {images / 'b.tif'}; --all_pixels predicts wherever" in said.err
    assert said.out.splitlines() == [str(tmp_path / "out" / name) for name in ("a.png", "b.tif", "c.png")]
    assert predict.main([str(option) for option in [*options, "--overwrite", "--all_pixels"]]) == cli.GOOD
    assert "no data" not in capsys.readouterr().err
    with rasterio.open(tmp_path / "out/b.tif") as mask:
        assert mask.read_masks(1).all()


def test_a_reader_that_leaves_ends_the_command_quietly(images, small, tmp_path, monkeypatch, capfd):
    segmenter = cegate.build(small())
    save_adapter(tmp_path / "adapter", segmenter, weight_hash(segmenter.vit), {})
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    options = {"--adapter": tmp_path / "adapter", "--input": images, "--output": tmp_path / "out"}
    assert predict.main([str(part) for option in options.items() for part in option]) == cli.GOOD
    assert "Traceback" not in capfd.readouterr().err
