from __future__ import annotations

import signal
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.transform import from_origin

from cegate.data.rasters import (
    LabelMap,
    Window,
    misplacement,
    open_image,
    read_header,
    read_image,
    read_mask,
    write_image,
    write_mask,
)
from cegate.errors import ConfigError, DataError

CLASSES = ("field", "road", "water")


def write(path: Path, array: np.ndarray, driver: str | None = None, colormap: dict | None = None, **profile) -> Path:
    """Write [C, H, W] (or [H, W]) with rasterio."""
    array = array[None] if array.ndim == 2 else array
    driver = driver or {".png": "PNG", ".jpg": "JPEG", ".tif": "GTiff"}[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver=driver, count=count, height=height, width=width, dtype=array.dtype, **profile
        ) as dst:
            if colormap:
                dst.write_colormap(1, colormap)
            dst.write(array)
    return path


@pytest.mark.parametrize(
    ("suffix", "dtype", "bands"),
    [(".png", "uint8", 1), (".png", "uint8", 4), (".png", "uint16", 3), (".tif", "uint8", 3), (".tif", "uint16", 5),
     (".tif", "int16", 13), (".tif", "float32", 2)],
)  # fmt: skip
def test_pixels_come_back_as_stored(tmp_path, suffix, dtype, bands):
    array = (np.random.default_rng(0).random((bands, 13, 9)) * 200).astype(dtype)
    path = write(tmp_path / f"a{suffix}", array)
    assert read_image(path).dtype == dtype
    assert (read_image(path) == array).all()
    assert read_header(path).size == (13, 9)
    assert read_header(path).bands == bands


def test_a_jpeg_is_read(tmp_path):
    path = write(tmp_path / "a.jpg", np.full((3, 16, 16), 90, np.uint8))
    assert np.abs(read_image(path).astype(int) - 90).max() < 4


def test_bands_are_taken_in_the_order_given_and_may_repeat(tmp_path):
    array = np.arange(4 * 6 * 5, dtype=np.uint16).reshape(4, 6, 5)
    path = write(tmp_path / "a.tif", array)
    assert (read_image(path, [4, 2, 2]) == array[[3, 1, 1]]).all()
    assert (read_image(path, [3], window=Window(2, 1, 3, 4)) == array[[2], 2:5, 1:5]).all()


def test_a_palette_image_is_read_as_its_colours(tmp_path):
    table = {0: (10, 20, 30, 255), 1: (200, 100, 50, 255)}
    values = np.array([[0, 1], [1, 1]], np.uint8)
    path = write(tmp_path / "a.png", values, colormap=table)
    image = read_image(path, (1, 2, 3))
    assert read_header(path).bands == 3
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 1, 0].tolist() == [200, 100, 50]


def test_a_file_without_georeference_is_read_without_a_warning(tmp_path):
    path = write(tmp_path / "a.png", np.zeros((3, 8, 8), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path)
        write_mask(tmp_path / "m.tif", np.zeros((8, 8), np.uint8), like=path)


def test_too_few_bands_name_the_file_and_both_counts(tmp_path):
    path = write(tmp_path / "sar.tif", np.zeros((2, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"sar\.tif has 2 bands, band 3 is not there; .*\[1, 2, 2\]"):
        read_image(path, (1, 2, 3))


def without_data(path: Path, window: Window | None = None) -> list[list[bool]] | None:
    with open_image(path) as image:
        found = image.without_data(window=window)
    return None if found is None else found.tolist()


def test_a_pixel_has_no_data_where_every_band_holds_the_nodata_value(tmp_path):
    pixels = np.array([[[0, 0], [5, 0]], [[0, 3], [0, 0]], [[0, 0], [0, 0]]], np.uint16)
    assert without_data(write(tmp_path / "image.tif", pixels, nodata=0)) == [[True, False], [False, True]]
    assert without_data(tmp_path / "image.tif", Window(1, 0, 1, 2)) == [[False, True]]
    assert without_data(write(tmp_path / "untagged.tif", pixels)) is None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_transparent_pixel_has_no_data(tmp_path, suffix):
    pixels = np.full((4, 2, 2), 255, np.uint8)
    pixels[3, 0] = 0
    assert without_data(write(tmp_path / f"image{suffix}", pixels)) == [[True, True], [False, False]]


@pytest.mark.parametrize("infrared", [[[0, 80], [120, 255]], [[0, 0], [0, 0]]], ids=["land", "water"])
def test_infrared_that_a_writer_called_alpha_hides_no_pixel(tmp_path, infrared):
    pixels = np.full((4, 2, 2), 9, np.uint8)
    pixels[3] = infrared
    path = write(tmp_path / "image.tif", pixels)
    with rasterio.open(path) as src:
        assert src.colorinterp[3].name == "alpha"
    assert without_data(path) is None


def test_a_mask_inside_the_file_counts(tmp_path):
    path = write(tmp_path / "image.tif", np.ones((3, 2, 2), np.uint8))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dst:
        dst.write_mask(np.array([[0, 255], [255, 255]], np.uint8))
    assert without_data(path) == [[True, False], [False, False]]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_damaged_file_is_an_error_of_one_line_that_names_it(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8)
    path = write(tmp_path / f"half{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"half\{suffix}: cannot be read as a raster") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_raster_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as a raster"):
        read_header(tmp_path / "a.png")


def test_values_are_class_indices_by_default(tmp_path):
    path = write(tmp_path / "m.png", np.array([[0, 1], [2, 255]], np.uint8))
    assert read_mask(path, classes=CLASSES).tolist() == [[0, 1], [2, 255]]


def test_values_map_to_names_indices_and_ignore(tmp_path):
    path = write(tmp_path / "m.tif", np.array([[-1, 7], [300, 7]], np.int16))
    assert read_mask(path, {"-1": "ignore", 7: "water", "300": 1}, classes=CLASSES).tolist() == [[255, 2], [1, 2]]


def test_another_ignore_value_takes_the_place_of_255(tmp_path):
    path = write(tmp_path / "m.png", np.array([[0, 1], [2, 2]], np.uint8))
    assert read_mask(path, {1: "field", 2: "road"}, classes=CLASSES, ignore=0).tolist() == [[255, 0], [1, 1]]


def test_a_nodata_tag_hides_no_class(tmp_path):
    path = write(tmp_path / "m.tif", np.array([[0, 1], [0, 1]], np.uint8), nodata=0)
    assert read_mask(path, classes=CLASSES).tolist() == [[0, 1], [0, 1]]


COLOURS = {"#ff0000": "road", "#0000FF": "water", "#7f7F7f": "ignore"}
SEEN = np.array([[1, 2], [255, 1]], np.uint8)


@pytest.mark.parametrize("bands", [3, 4])
def test_colours_are_looked_up_whatever_their_case(tmp_path, bands):
    rgb = np.array([[[255, 0], [127, 255]], [[0, 0], [127, 0]], [[0, 255], [127, 0]], [[255] * 2] * 2], np.uint8)
    assert (read_mask(write(tmp_path / "m.png", rgb[:bands]), COLOURS, classes=CLASSES) == SEEN).all()


def test_colours_of_a_palette_file_are_those_of_its_table(tmp_path):
    table = {5: (255, 0, 0, 255), 6: (0, 0, 255, 255), 9: (127, 127, 127, 255)}
    path = write(tmp_path / "m.png", np.array([[5, 6], [9, 5]], np.uint8), colormap=table)
    assert (read_mask(path, COLOURS, classes=CLASSES) == SEEN).all()
    assert read_mask(path, {5: 0, 6: 1, 9: 2}, classes=CLASSES).tolist() == [[0, 1], [2, 0]]  # values are the indices


def test_colours_of_a_grey_file_are_greys(tmp_path):
    path = write(tmp_path / "m.png", np.array([[0, 255]], np.uint8))
    assert read_mask(path, {"#000000": "field", "#FFFFFF": "road"}, classes=CLASSES).tolist() == [[0, 1]]


def test_a_grey_mask_saved_as_rgb_keeps_its_values(tmp_path):
    path = write(tmp_path / "m.png", np.repeat(np.array([[[0, 2]]], np.uint8), 3, axis=0))
    assert read_mask(path, classes=CLASSES).tolist() == [[0, 2]]


def test_values_outside_the_map_are_named_with_their_pixel_counts(tmp_path):
    path = write(tmp_path / "m.png", np.array([[0, 9, 9], [7, 9, 255]], np.uint8))
    with pytest.raises(
        DataError, match=r"m\.png: mask values outside the label map: 9 \(3 px\), 7 \(1 px\); known are"
    ):
        read_mask(path, classes=CLASSES)


def test_colours_outside_the_map_are_named_with_their_pixel_counts(tmp_path):
    rgb = np.zeros((3, 2, 2), np.uint8)
    rgb[0] = 255
    rgb[:, 0, 0] = (1, 2, 171)
    with pytest.raises(DataError, match=r"mask colours outside the label map: #0102AB \(1 px\); known are #FF0000"):
        read_mask(write(tmp_path / "m.png", rgb), COLOURS, classes=CLASSES)


def test_nan_in_a_float_mask_is_outside_the_map(tmp_path):
    path = write(tmp_path / "m.tif", np.array([[0, np.nan]], np.float32))
    with pytest.raises(DataError, match=r"nan \(1 px\).*a label_map takes integers: write the masks anew"):
        read_mask(path, classes=CLASSES)


def test_colours_without_a_map_of_colours_are_refused(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (3, 4, 4), np.uint8)
    with pytest.raises(
        DataError, match=r"m\.png: the mask has 3 bands of colour; give a label_map with '#RRGGBB' keys"
    ):
        read_mask(write(tmp_path / "m.png", rgb), classes=CLASSES)


def test_every_mistake_in_a_label_map_is_listed():
    wrong = {"#12345": "road", "#FFFFFF": "raod", "3": "water"}
    with pytest.raises(ConfigError) as caught:
        LabelMap.parse(wrong, CLASSES)
    text = str(caught.value)
    assert all(part in text for part in ("'#12345'", "'raod' is no class; did you mean 'road'?", "key '3'", "field"))
    with pytest.raises(ConfigError, match="'x' is not an integer"):
        LabelMap.parse({"x": 0}, CLASSES)
    with pytest.raises(ConfigError, match="3 is no class"):
        LabelMap.parse({"1": 3}, CLASSES)
    with pytest.raises(ConfigError, match="'1' is given twice"):
        LabelMap.parse({"1": 0, 1: 2}, CLASSES)


@given(
    codes=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int32, np.float32]), (4, 5), elements={"min_value": 0, "max_value": 9}
    ),
    known=st.dictionaries(st.integers(0, 9), st.integers(0, 2)),
)
def test_a_label_map_agrees_with_a_loop_over_pixels(codes, known):
    label, unmapped = LabelMap.parse(known, CLASSES).apply(codes)
    for got, missing, code in zip(label.flat, unmapped.flat, codes.flat, strict=True):
        assert missing == (code not in known)
        assert missing or got == known[code]


def test_a_large_mask_is_written_in_tiles(tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, (600, 1100), dtype=np.uint8)
    for name, part in {"large": mask, "small": mask[:100]}.items():
        write_mask(tmp_path / f"{name}.tif", part)
        with rasterio.open(tmp_path / f"{name}.tif") as written:
            assert (written.block_shapes == [(512, 512)]) == (name == "large")
            np.testing.assert_array_equal(written.read(1), part)


def test_places_are_compared_across_coordinate_systems_and_not_at_all_where_one_is_unknown(tmp_path):
    shape = {"height": 8, "width": 9, "count": 1, "dtype": "uint8"}
    places = {
        "utm": {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 0.5, 0.5)},
        "nowhere": {"transform": from_origin(500000, 5000000, 0.5, 0.5)},
        "degrees": {"crs": "EPSG:4326", "transform": from_origin(15, 45, 1e-5, 1e-5)},
        "beyond": {"crs": "EPSG:4326", "transform": from_origin(15, 89.9999, 10, 10)},
        "moved": {"crs": "EPSG:32633", "transform": from_origin(500001, 5000000, 0.5, 0.5)},
        "none": {},
        "broken": {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 1, 0.5, 0, 1)},
    }
    headers = {}
    for name, place in places.items():
        with rasterio.open(tmp_path / f"{name}.tif", "w", driver="GTiff", **shape, **place) as out:
            out.write(np.zeros((1, 8, 9), np.uint8))
        headers[name] = read_header(tmp_path / f"{name}.tif")
    found = {name: misplacement(headers["utm"], header) for name, header in headers.items()}
    assert found.pop("degrees") == pytest.approx(34_000, rel=0.05)  # latitude 45 lies 17 km to the south
    assert found.pop("beyond") > 1e6
    assert found == pytest.approx({"utm": 0, "nowhere": 0, "moved": 2, "none": 0, "broken": 0}, abs=1e-6)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_written_mask_keeps_place_and_colours(tmp_path, suffix):
    transform = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)
    scene = write(tmp_path / "scene.tif", np.zeros((3, 6, 7), np.uint8), crs="EPSG:32633", transform=transform)
    mask = np.arange(42, dtype=np.uint8).reshape(6, 7) % 3
    write_mask(tmp_path / f"mask{suffix}", mask, like=scene, palette=["#102030", "#FFFFFF", "#00FF00"])
    with rasterio.open(tmp_path / f"mask{suffix}") as src:
        assert (src.read(1) == mask).all()
        if suffix == ".tif":
            assert src.crs == rasterio.CRS.from_epsg(32633)
            assert src.transform.almost_equals(transform)
        assert src.colormap(1)[0][:3] == (0x10, 0x20, 0x30)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_full_disk_is_an_error_and_no_shorter_file(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_mask(tmp_path / f"mask{suffix}", noise)
        with pytest.raises(OSError, match="File too large"):
            write_image(tmp_path / "image.png", noise[None])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_mask_of_another_size_or_kind_is_not_written(tmp_path):
    scene = write(tmp_path / "scene.tif", np.zeros((3, 6, 7), np.uint8))
    with pytest.raises(DataError, match=r"the mask is 5x4, but .*scene\.tif is 7x6 pixels"):
        write_mask(tmp_path / "m.tif", np.zeros((4, 5), np.uint8), like=scene)
    with pytest.raises(DataError, match=r"m\.jpg: a mask cannot be written as \.jpg"):
        write_mask(tmp_path / "m.jpg", np.zeros((4, 5), np.uint8))
    with pytest.raises(DataError, match=r"not \[4, 5\] int64"):
        write_mask(tmp_path / "m.png", np.zeros((4, 5), np.int64))


def test_an_image_is_written_as_png_and_read_back_out_of_a_zip_too(tmp_path):
    pixels = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    write_image(tmp_path / "a.png", pixels)
    assert (read_image(tmp_path / "a.png") == pixels).all()
    with zipfile.ZipFile(tmp_path / "z z.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "in/a.png")
    assert (read_image(f"/vsizip/{{{tmp_path}/z z.zip}}/in/a.png", [3]) == pixels[2:3]).all()
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        read_header(f"/vsizip/{{{tmp_path}/z z.zip}}/in/b.png")


def test_heights_are_written_as_tiff_as_they_are(tmp_path):
    metres = np.random.default_rng(0).random((1, 6, 5), np.float32) * 300
    write_image(tmp_path / "a.tif", metres)
    assert read_image(tmp_path / "a.tif").dtype == np.float32 and (read_image(tmp_path / "a.tif") == metres).all()


@pytest.mark.parametrize(
    ("name", "pixels"),
    [("a.jpg", np.zeros((3, 4, 4), np.uint8)), ("a.png", np.zeros((3, 4, 4), np.uint16)),
     ("a.png", np.zeros((4, 4), np.uint8)), ("a.png", np.zeros((5, 4, 4), np.uint8))],
)  # fmt: skip
def test_what_is_no_png_is_refused(tmp_path, name, pixels):
    with pytest.raises(DataError, match=r"a PNG takes \[1\.\.4, H, W\] uint8, not"):
        write_image(tmp_path / name, pixels)
