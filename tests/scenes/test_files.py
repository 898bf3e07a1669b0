from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import from_origin

from cegate import cli, predict
from cegate.adapter_folder import save_adapter
from cegate.backbone.vit import weight_hash
from cegate.data.rasters import OpenImage
from cegate.errors import DataError
from cegate.runfolder import written_aside
from cegate.scenes import sink
from cegate.scenes.files import Written, find_images, plan_outputs, predict_files


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


def test_georeferenced_input_gives_a_geotiff_and_the_rest_png(images, segmenter, tmp_path):
    masks = plan_outputs(find_images([str(images)]), tmp_path / "out")
    assert [written.mask.name for written in predict_files(segmenter, masks)] == ["a.png", "b.tif", "c.png"]
    with rasterio.open(images / "b.tif") as src, rasterio.open(tmp_path / "out/b.tif") as mask:
        assert (mask.crs, mask.transform, mask.shape) == (src.crs, src.transform, src.shape)
        assert mask.nodata == 255
        assert np.array_equal(mask.read(1), segmenter.predict(images / "b.tif"))
        assert "#{:02X}{:02X}{:02X}".format(*mask.colormap(1)[1][:3]) == segmenter.recipe.palette[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.tif", "c.png"]


def test_one_image_goes_into_the_file_that_is_named(images, segmenter, tmp_path):
    masks = plan_outputs([images / "b.tif"], tmp_path / "mask.png")
    written = list(predict_files(segmenter, masks))
    assert written == [Written(tmp_path / "mask.png", images / "b.tif", 0)]
    with pytest.raises(DataError, match="one file for 2 images"):
        plan_outputs([images / "a.png", images / "b.tif"], tmp_path / "mask.png")


def test_inputs_are_files_folders_and_globs_each_once(images):
    assert [path.name for path in find_images([str(images / "*.tif"), str(images)])] == ["b.tif", "c.tif", "a.png"]
    with pytest.raises(DataError, match=r"nowhere\*\.png names no image"):
        find_images([str(images / "nowhere*.png")])


def test_a_glob_takes_images_and_not_what_lies_beside_them(images):
    hidden = ("._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png")
    for name in ("a.pgw", "b.tif.aux.xml", "Thumbs.db", "d.tif/e", *hidden):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"x")
    for pattern in ("*", "**", "**/*", "*.*"):
        assert [path.name for path in find_images([str(images / pattern)])] == ["a.png", "b.tif", "c.tif"], pattern
    assert [path.name for path in find_images([str(images / "**/*.tif")])] == ["b.tif", "c.tif"]
    (images / "f.img").write_bytes(b"x")
    assert [path.name for path in find_images([str(images / "*.img")])] == ["f.img"]


def test_a_link_to_a_folder_above_gives_no_image_twice(images, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (images / "up").symlink_to(images.parent)
    (images / "there").symlink_to(elsewhere)
    (elsewhere / "d.png").write_bytes((images / "a.png").read_bytes())
    found = find_images([str(images.parent / "**/*.*")])
    assert [str(file.relative_to(images)) for file in found] == ["a.png", "b.tif", "c.tif", "there/d.png"]


def test_another_way_to_one_file_is_no_other_image(images, segmenter, tmp_path):
    there, link = tmp_path / "there", images.parent / "c.tif"
    there.symlink_to(images)
    link.symlink_to(images / "c.tif")
    (images / "d.tif").symlink_to("c.tif")  # another name, and so another mask
    ways = [images / "c.tif", images / ".." / images.name / "c.tif", there / "c.tif", link, images / "d.tif"]
    found = find_images([str(way) for way in ways])
    assert found == [images / "c.tif", images / "d.tif"]
    assert find_images([str(there), str(images)]) == [there / name for name in ("a.png", "b.tif", "c.tif", "d.tif")]
    assert plan_outputs(find_images([str(way) for way in ways[:4]]), tmp_path / "mask.png")


def test_an_empty_input_is_not_the_working_directory(images, monkeypatch):
    monkeypatch.chdir(images)
    with pytest.raises(DataError, match="an input is empty; give a file, a folder or a glob"):
        find_images([""])


def test_nothing_is_overwritten_unasked(images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"a\.png exists; .*--overwrite"):
        plan_outputs(find_images([str(images)]), tmp_path / "out")
    assert plan_outputs([images / "a.png"], tmp_path / "out", overwrite=True)
    with pytest.raises(DataError, match=r"would replace .*a\.png, which is read"):
        plan_outputs(find_images([str(images)]), images, overwrite=True)


def test_a_mask_that_cannot_be_written_leaves_the_older_one(images, segmenter, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.tif").write_bytes(b"older")

    class FullDisk(sink.MaskFile):
        def write(self, rows):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sink, "MaskFile", FullDisk)
    (images / "aa_broken.png").write_text("no picture")
    masks = plan_outputs([images / "aa_broken.png", images / "b.tif"], tmp_path / "out", overwrite=True)
    with pytest.raises(DataError, match=r"out/b\.tif cannot be written \(No space left on device\).*aa_broken\.png"):
        list(predict_files(segmenter, masks))
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"older"]


def test_what_a_killed_process_left_beside_a_mask_goes_and_what_a_living_one_writes_stays(images, segmenter, tmp_path):
    (tmp_path / "out").mkdir()
    script = (
        "import os, signal, sys; from pathlib import Path; from cegate.runfolder import written_aside\n"
        "with written_aside(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("b.tif", "other.tif"):
        subprocess.run([sys.executable, "-c", script, tmp_path / "out" / name], check=False)
    killed = {path.name.split(".")[1] for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out/.b.mine.tif").touch()
    with written_aside(tmp_path / "out/b.tif") as alive:
        list(predict_files(segmenter, plan_outputs([images / "b.tif"], tmp_path / "out")))
        left = {path.name for path in (tmp_path / "out").iterdir()}
    assert killed == {"b", "other"} and len(left) == 4
    assert {"b.tif", ".b.mine.tif", alive.name} < left and any(name.startswith(".other.") for name in left)


@pytest.mark.parametrize("is_within", [False, True])
def test_an_output_folder_that_goes_is_not_made_anew(images, segmenter, tmp_path, monkeypatch, is_within):
    out = tmp_path / "out"
    predicted = predict_files(segmenter, plan_outputs(find_images([str(images)]), out))
    next(predicted)
    if is_within:
        write = sink.MaskFile.write
        monkeypatch.setattr(sink.MaskFile, "write", lambda *args: (write(*args), shutil.rmtree(out)))
    else:
        out.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"out was removed or moved while masks were written there; put it back"):
        next(predicted)
    assert not out.exists()


def test_images_of_one_name_are_told_apart(images, tmp_path):
    (images / "deep").mkdir()
    twin = images / "deep" / "a.png"
    twin.write_bytes((images / "a.png").read_bytes())
    with pytest.raises(DataError, match="would both be written to"):
        plan_outputs([images / "a.png", twin], tmp_path / "out")


def test_images_that_cannot_be_used_are_named_after_the_others_are_done(images, segmenter, tmp_path):
    (images / "aa_broken.tif").write_bytes(b"no picture")
    (images / "two_bands.tif").write_bytes(two_bands(images / "b.tif"))
    masks = plan_outputs(find_images([str(images)]), tmp_path / "out")
    told = []
    predicted = predict_files(segmenter, masks, told.append)
    assert [written.mask.name for written in islice(predicted, 3)] == ["a.png", "b.tif", "c.png"]
    why = r"2 of 5 images have no mask: .*aa_broken\.tif.*two_bands\.tif has 2 bands, the model reads"
    with pytest.raises(DataError, match=why):
        next(predicted)
    assert plan_outputs(find_images([str(images)]), tmp_path / "out", keep=True).keys() == {
        images / "aa_broken.tif",
        images / "two_bands.tif",
    }
    assert told == sorted(told) and {1, 2, 3, 4, 5} <= set(told)


def test_an_image_that_goes_before_its_turn_stops_no_other(images, segmenter, tmp_path):
    predicted = predict_files(segmenter, plan_outputs(find_images([str(images)]), tmp_path / "out"))
    assert next(predicted).mask.name == "a.png"
    (images / "b.tif").unlink()
    assert next(predicted).mask.name == "c.png"
    with pytest.raises(DataError, match=r"1 of 3 images have no mask: .*b\.tif: no such file"):
        next(predicted)


@pytest.mark.parametrize(("method", "number"), [("open", errno.EACCES), ("is_file", errno.EIO)])
def test_an_image_that_the_system_refuses_stops_no_other(images, segmenter, tmp_path, monkeypatch, method, number):
    found, call = find_images([str(images)]), getattr(Path, method)

    def refuse(self, *args, **kwargs):
        if self.name == "b.tif":
            raise OSError(number, os.strerror(number), str(self))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Path, method, refuse)
    predicted = predict_files(segmenter, plan_outputs(found, tmp_path / "out"))
    assert [written.mask.name for written in islice(predicted, 2)] == ["a.png", "c.png"]
    with pytest.raises(
        DataError, match=rf"1 of 3 images have no mask: .*b\.tif cannot be read \({os.strerror(number)}"
    ):
        next(predicted)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError("Unable to allocate 3.00 TiB"), r"b\.tif: out of memory \(Unable to allocate 3.00 TiB\); cut it"),
        (MemoryError(), r"out of memory \(MemoryError\)"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB"), r"CUDA out of memory. Tried to allo"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "DefaultCPUAllocator"),
        (rasterio.errors.RasterioIOError("Read failed. See previous exception"), r"b\.tif: cannot be read as a raster"),
    ],
    ids=["numpy", "bare", "gpu", "torch", "gdal"],
)
def test_what_goes_wrong_with_one_image_stops_no_other(images, segmenter, tmp_path, monkeypatch, error, why):
    read = OpenImage.read

    def fail(self, bands=None, *, window=None):
        if str(self._path).endswith("b.tif"):
            raise error
        return read(self, bands, window=window)

    monkeypatch.setattr(OpenImage, "read", fail)
    predicted = predict_files(segmenter, plan_outputs(find_images([str(images)]), tmp_path / "out"))
    assert [written.mask.name for written in islice(predicted, 2)] == ["a.png", "c.png"]
    with pytest.raises(DataError, match=why) as caught:
        next(predicted)
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_our_own_bugs_keep_their_traceback(images, segmenter, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(OpenImage, "read", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        next(predict_files(segmenter, {images / "a.png": tmp_path / "a.png"}))


def test_an_output_that_is_no_mask_and_no_folder_is_refused(images, tmp_path):
    for name in ("map.jpg", "map.geojson", "map.TIF.bak"):
        with pytest.raises(DataError, match=rf"{name}: a mask cannot be written as \.\w+; give a \.png or \.tif file"):
            plan_outputs([images / "a.png"], tmp_path / name)
        assert not (tmp_path / name).exists()
    (tmp_path / "v1.old").mkdir()
    assert plan_outputs([images / "a.png"], tmp_path / "v1.old")[images / "a.png"].parent == tmp_path / "v1.old"
    assert plan_outputs([images / "a.png"], tmp_path / "masks_0.5")


def test_what_a_killed_process_left_is_no_image(images):
    (images / ".a.x1y2z3w4.tif").write_bytes((images / "b.tif").read_bytes())
    (images / "folder.tif").mkdir()
    assert [path.name for path in find_images([str(images)])] == ["a.png", "b.tif", "c.tif"]


def test_windows_of_the_command_are_those_of_python(images, segmenter, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", segmenter, weight_hash(segmenter.vit), {})
    for number, windows in enumerate(({}, {"stride": 5}, {"blend": "none"}, {"stride": 5, "blend": "linear"})):
        options = {"adapter": tmp_path / "adapter", "input": images / "b.tif", "output": tmp_path / f"{number}.tif"}
        argv = [word for key, value in (options | windows).items() for word in (f"--{key}", str(value))]
        assert predict.main(argv) == cli.GOOD
        with rasterio.open(tmp_path / f"{number}.tif") as mask:
            assert np.array_equal(mask.read(1), segmenter.predict(images / "b.tif", **windows))
    capsys.readouterr()
    wrong = {
        "--stride 0": "--stride 0 is no step in pixels; give a whole number of 1 or more",
        "--stride 33": "stride=33 does not fit windows of 32 px; use 1..32",
        "--blend cosin": "--blend cosin is unknown; use none, linear, cosine",
    }
    for words, message in wrong.items():
        options = ["--adapter", tmp_path / "adapter", "--input", images / "b.tif", "--output", tmp_path / "m.tif"]
        assert predict.main([*map(str, options), *words.split()]) == cli.USAGE
        assert message in capsys.readouterr().err


def two_bands(path: Path) -> bytes:
    with rasterio.open(path) as src, rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", count=2, height=30, width=44, dtype="uint8") as out:
            out.write(src.read([1, 2]))
        return memory.read()


def test_ground_control_points_are_kept(images, segmenter, tmp_path):
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
    (written,) = predict_files(segmenter, plan_outputs([images / "gcp.tif"], tmp_path / "out"))
    with rasterio.open(written.mask) as mask:
        found, crs = mask.gcps
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
    assert crs == "EPSG:4326"


def test_a_place_in_a_side_file_is_kept_and_one_that_a_geotiff_cannot_hold_is_told(images, segmenter, tmp_path, caplog):
    for name in ("a.png", "c.tif"):
        (images / f"{name}.aux.xml").write_text(
            f"<PAMDataset><SRS>{CRS.from_epsg(32633).to_wkt()}</SRS>"
            "<GeoTransform>5e5, 0.5, 0, 5e6, 0, -0.5</GeoTransform></PAMDataset>"
        )
    with rasterio.open(images / "b.tif", "r+") as image:
        image.crs = "+proj=isea"
    list(predict_files(segmenter, plan_outputs(find_images([str(images)]), tmp_path / "out")))
    for name in ("a.tif", "b.tif", "c.tif"):
        with rasterio.open(tmp_path / "out" / name) as mask:
            assert mask.transform == from_origin(500000, 5000000, 0.5, 0.5)
            assert mask.crs == (None if name == "b.tif" else "EPSG:32633")
    told = [record.getMessage() for record in caplog.records if "keys for its coordinate system" in record.message]
    assert len(told) == 1 and told[0].startswith(f"{images / 'b.tif'}: GeoTIFF has no keys")


@pytest.mark.parametrize(("rows", "columns", "share"), [(15, 44, "50.0 %"), (30, 44, "100.0 %"), (1, 1, "under 0.1 %")])
def test_images_without_data_in_places_are_named(images, segmenter, tmp_path, capsys, rows, columns, share):
    with rasterio.open(images / "b.tif", "r+") as image:
        pixels = image.read()
        pixels[:, :rows, :columns] = 255
        image.write(pixels)
        image.nodata = 255
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


def write_bands(path: Path, count: int, names: tuple[str, ...] = (), **profile) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (count, 30, 44), dtype=np.uint8)
    shape = {"height": 30, "width": 44, "count": count, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", **shape, **profile) as out:
        out.write(pixels)
        for band, name in enumerate(names, 1):
            out.set_band_description(band, name)


def test_bands_that_nobody_chose_are_named_once(images, segmenter, tmp_path, capsys, caplog):
    save_adapter(tmp_path / "adapter", segmenter, weight_hash(segmenter.vit), {})
    for number in range(6):
        write_bands(images / f"s{number}.tif", 13, tuple(f"B{k:02d}" for k in range(1, 14)))
    given = ["--adapter", str(tmp_path / "adapter"), "--input", str(images), "--device", "cpu"]
    assert predict.main([*given, "--output", str(tmp_path / "out")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    told = ", ".join(f"B{k:02d}" for k in range(1, 14))
    assert line.startswith(f"images have 13 bands ({told}), of which 1 B01, 2 B02, 3 B03 are read, as in training: ")
    assert re.search(r"s0\.tif, .*s3\.tif and 2 more; data\.source\.bands", line)
    segmenter.predict(images / "s0.tif")
    assert "s0.tif has 13 bands" in caplog.text


def test_an_alpha_band_or_chosen_bands_are_no_news(images, segmenter, monkeypatch, caplog):
    write_bands(images / "alpha.tif", 4, alpha="yes")
    segmenter.predict(images / "alpha.tif")
    write_bands(images / "many.tif", 13)
    monkeypatch.setattr(segmenter, "recipe", replace(segmenter.recipe, bands=(4, 3, 2)))
    segmenter.predict(images / "many.tif")
    assert caplog.records == []


def test_a_reader_that_leaves_ends_the_command_quietly(images, segmenter, tmp_path, monkeypatch, capfd):
    save_adapter(tmp_path / "adapter", segmenter, weight_hash(segmenter.vit), {})
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    options = {"--adapter": tmp_path / "adapter", "--input": images, "--output": tmp_path / "out"}
    assert predict.main([str(part) for option in options.items() for part in option]) == cli.GOOD
    assert "Traceback" not in capfd.readouterr().err
