"""A second raster: on the image's grid, scaled as said, and NaN where nothing is known."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.warp import transform as transform_points

from cegate.config import AugmentConfig, SecondConfig, SetConfig
from cegate.data import generator, sets
from cegate.data.datasets import open_set
from cegate.data.rasters import Window, read_header
from cegate.data.second import open_second, scaled
from cegate.data.stream import EvalStream, TrainStream
from cegate.data.transforms import Crop
from cegate.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = ("field", "road")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
UTM = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.5, 0.5)}


def write(path: Path, array: np.ndarray, **profile) -> Path:
    array = array[None] if array.ndim == 2 else array
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    driver = {".png": "PNG", ".tif": "GTiff"}[path.suffix]
    shape = {"driver": driver, "count": count, "height": height, "width": width, "dtype": str(array.dtype)}
    with rasterio.open(path, "w", **shape | profile) as dst:
        dst.write(array)
    return path


def heights(number: int = 0, shape=(40, 36)) -> np.ndarray:
    return (np.random.default_rng(100 + number).random(shape) * 20 + 250).astype(np.float32)


@pytest.fixture
def root(tmp_path) -> Path:
    """Three images with masks, and heights in metres on their grid."""
    rng = np.random.default_rng(0)
    for number in range(3):
        write(tmp_path / f"images/{number}.tif", rng.integers(1, 250, (3, 40, 36), dtype=np.uint8), **UTM)
        write(tmp_path / f"masks/{number}.png", rng.integers(0, 2, (40, 36), dtype=np.uint8))
        write(tmp_path / f"second/{number}.tif", heights(number), **UTM)
    return tmp_path


def open_it(root: Path, *, labelled: bool = True, set_keys: dict | None = None, **keys):
    cfg = SetConfig(root=str(root), second=SecondConfig(**keys), **set_keys or {})
    return open_set(cfg, name="s", classes=CLASSES, labelled=labelled)


def second_of(data, index: int = 0, window: Window | None = None) -> np.ndarray:
    return data.read(index, window).image[3:]


def minmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return (values - np.nanmin(values)) / (np.nanmax(values) - np.nanmin(values) + 1e-8)


# --- scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [np.float32, np.float64, np.uint8, np.uint16, np.int16], ids=lambda t: t.__name__)
@pytest.mark.parametrize("whole", [True, False], ids=["held", "by window"])
def test_a_tile_is_scaled_over_the_whole_of_it_before_it_is_cropped(root, monkeypatch, unit, whole):
    monkeypatch.setattr(sets, "LARGE_PX", 2**24 if whole else 0)
    stored = {np.uint8: lambda h: h - 200, np.uint16: lambda h: h * 100}.get(unit, lambda h: h)(heights()).astype(unit)
    write(root / "second/0.tif", stored, **UTM)
    data = open_it(root)
    np.testing.assert_allclose(second_of(data)[0], minmax(stored), atol=2e-6)
    window = Window(3, 5, 20, 30)
    np.testing.assert_array_equal(second_of(data, 0, window), second_of(data)[:, 3:23, 5:35])
    assert data.second_bands == (1,) and data.channels == (3, 1)


def test_a_flat_tile_becomes_0(root):
    write(root / "second/1.tif", np.full((40, 36), 7.5, np.float32), **UTM)
    assert (second_of(open_it(root), 1) == 0).all()


def test_a_fixed_range_keeps_the_unit_from_tile_to_tile_and_clips(root):
    data = open_it(root, scale="fixed", value_range=[255.0, 265.0])
    for index in range(3):
        np.testing.assert_allclose(second_of(data, index)[0], np.clip((heights(index) - 255) / 10, 0, 1), atol=1e-5)
    for keys in ({"scale": "fixed"}, {"value_range": [0, 1]}):
        with pytest.raises(ConfigError, match=r"set 's': second\.scale=fixed and second\.value_range go together"):
            open_it(root, **keys)


def test_one_raster_for_all_images_is_scaled_by_the_whole_file_where_the_scene_counts(root):
    scene = heights(9, (60, 50))
    write(root / "dsm.tif", scene, **UTM)
    moved = UTM | {"transform": from_origin(500_005, 4_999_996, 0.5, 0.5)}
    write(root / "images/1.tif", np.full((3, 40, 36), 9, np.uint8), **moved)  # 10 px to the right, 8 px down
    whole = open_it(root, images="dsm.tif", scale="scene")
    low, high = scene.min(), scene.max()
    np.testing.assert_allclose(second_of(whole)[0], (scene[:40, :36] - low) / (high - low), atol=1e-5)
    np.testing.assert_allclose(second_of(whole, 1)[0], (scene[8:48, 10:46] - low) / (high - low), atol=1e-5)
    tile = open_it(root, images="dsm.tif")
    np.testing.assert_allclose(second_of(tile, 1)[0], minmax(scene[8:48, 10:46]), atol=1e-5)


# --- what is unknown ------------------------------------------------------------------------------------------------


HOLES = np.zeros((40, 36), bool)
HOLES[4:9, 6:12] = True


@pytest.mark.parametrize(
    ("hole", "tag"), [(-9999.0, -9999.0), (np.nan, None), (-3.4e38, None), (np.inf, None), (np.nan, np.nan)], ids=str
)
def test_holes_are_no_zeros_and_do_not_count_for_the_scale(root, hole, tag):
    pixels = np.where(HOLES, np.float32(hole), heights())
    write(root / "second/0.tif", pixels, nodata=tag, **UTM)
    got = second_of(open_it(root))[0]
    np.testing.assert_array_equal(np.isnan(got), HOLES)
    np.testing.assert_allclose(got[~HOLES], minmax(np.where(HOLES, np.nan, heights()))[~HOLES], atol=1e-5)


def test_holes_stay_holes_through_resizing_and_do_not_spread(root):
    write(root / "second/0.tif", np.where(HOLES, np.nan, 3 * np.indices((40, 36))[0]).astype(np.float32), **UTM)
    values = second_of(open_it(root))
    for scaled_size in ((40, 36), (60, 54), (20, 18)):
        box = Crop((40, 36), scaled_size, 0, 0, *scaled_size)
        got = box.resample_known(values)[0]
        around = np.stack([np.roll(HOLES, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)])
        assert np.isnan(got[box.resample_label(around.all(0))]).all()
        assert np.isfinite(got[~box.resample_label(around.any(0))]).all()
        assert np.isnan(got).mean() == pytest.approx(HOLES.mean(), rel=0.25)
        ramp = box.resample_image(np.indices((40, 36))[:1].astype(np.float32) / 39)[0]
        inner = ~np.isnan(got)
        assert np.abs(got - ramp)[inner].max() < 0.5 / 39  # beside a hole the known neighbour counts alone


def test_an_image_without_a_second_raster_is_named_or_unknown_throughout(root):
    (root / "second/1.tif").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images have no second raster in .*, first .*1\.tif; .*missing: allow"):
        open_it(root)
    data = open_it(root, missing="allow")
    data.check()
    assert np.isnan(second_of(data, 1)).all() and not np.isnan(second_of(data, 2)).any()
    assert np.isfinite(data.read(1).image[:3]).all()
    for file in (root / "second").iterdir():
        file.unlink()
    assert np.isnan(second_of(open_it(root, missing="allow"))).all()
    with pytest.raises(DataError, match=r"no images match .*second/\*.*\(second\.images\)"):
        open_it(root)
    with pytest.raises(DataError, match=r"no second raster .*dsm\.tif"):
        open_it(root, images="dsm.tif")


def test_an_image_is_no_second_raster_of_itself_but_its_other_bands_may_be(root):
    with pytest.raises(DataError, match=r"0\.tif would be its own second raster \(band 1 is read for both\); mend sec"):
        open_it(root, images="images/*", bands=[1]).check()
    data = open_it(root, images="images/*", bands=[3], set_keys={"bands": [2, 1]})
    assert data.read(0).image.shape[0] == 3


def test_a_raster_of_nothing_but_holes_is_refused_unless_it_may_miss(root):
    write(root / "second/0.tif", np.full((40, 36), -1, np.int16), nodata=-1, **UTM)
    with pytest.raises(DataError, match=r"0\.tif: no pixel of the second raster is known; .*second\.missing: allow"):
        open_it(root).check(training=True)  # before a training, not in the middle of one
    with pytest.raises(DataError, match=r"0\.tif: no pixel of the second raster is known; .*second\.missing: allow"):
        open_it(root).read(0)
    assert np.isnan(second_of(open_it(root, missing="allow"))).all()


# --- grids ----------------------------------------------------------------------------------------------------------


def plane(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Metres at map coordinates: bilinear interpolation keeps a plane."""
    return (columns - 500_000) * 0.7 + (rows - 4_999_990) * 0.3 + 100


def on_grid(place, shape) -> np.ndarray:
    rows, columns = np.indices(shape) + 0.5
    return plane(*(place * (columns, rows))).astype(np.float32)


@pytest.mark.parametrize(
    ("place", "shape", "said"),
    [
        (
            from_origin(499_990, 5_000_010, 0.8, 0.8),
            (60, 60),
            r"of 0\.8, the image's of 0\.5, its corner -20\.00",
        ),
        (from_origin(500_000.25, 5_000_000, 0.5, 0.5), (40, 36), r"corner \+0\.50 px right and \+0\.00 px down"),
        (from_origin(499_980, 5_000_020, 2.0, 2.0), (40, 40), r"pixels of 2"),
    ],
)
def test_another_grid_is_warped_and_said_once_with_the_shift_in_pixels(root, caplog, place, shape, said):
    for number in range(3):
        write(root / f"second/{number}.tif", on_grid(place, shape), crs="EPSG:32633", transform=place)
    data = open_it(root, scale="fixed", value_range=[0, 200])
    data.check()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(said, line) and "3 of 3 second rasters" in line and "warped" in line
    got = second_of(data)[0] * 200
    expected = on_grid(UTM["transform"], (40, 36))
    known = ~np.isnan(got)
    assert known[:, 2:].all()
    np.testing.assert_allclose(got[:, 2:], expected[:, 2:], atol=0.02)
    with pytest.raises(DataError, match=r"3 of 3 second rasters lie on other grids .* set second\.align: true"):
        open_it(root, align=False).check()


def test_another_coordinate_system_is_warped(root):
    """A grid in degrees whose values are computed where they lie."""
    (left, right), (top, bottom) = transform_points(
        "EPSG:32633", "EPSG:4326", [499_990, 500_030], [5_000_010, 4_999_970]
    )
    step = 5e-6
    place = from_origin(left, top, step, step)
    shape = (int((top - bottom) / step), int((right - left) / step))
    rows, columns = np.indices(shape) + 0.5
    lon, lat = place * (columns, rows)
    x, y = transform_points("EPSG:4326", "EPSG:32633", lon.ravel(), lat.ravel())
    values = plane(np.array(x), np.array(y)).reshape(shape).astype(np.float32)
    for number in range(3):
        write(root / f"second/{number}.tif", values, crs="EPSG:4326", transform=place)
    got = second_of(open_it(root, scale="fixed", value_range=[0, 200]))[0] * 200
    np.testing.assert_allclose(got, on_grid(UTM["transform"], (40, 36)), atol=0.1)


def test_what_a_raster_does_not_cover_is_unknown(root):
    place = from_origin(500_005, 4_999_995, 0.8, 0.8)  # begins 10 px to the right and down
    for number in range(3):
        write(root / f"second/{number}.tif", on_grid(place, (60, 60)), crs="EPSG:32633", transform=place)
    got = second_of(open_it(root, scale="fixed", value_range=[0, 200]))[0]
    assert np.isnan(got[:9]).all() and np.isnan(got[:, :9]).all()
    assert np.isfinite(got[11:, 11:]).all()


def test_integers_with_a_tag_leave_no_mixture_at_the_edge_of_a_hole(root):
    place = from_origin(499_990, 5_000_010, 0.8, 0.8)
    pixels = np.full((60, 60), 2000, np.uint16)
    pixels[20:26, 20:26] = 65535
    for number in range(3):
        write(root / f"second/{number}.tif", pixels, crs="EPSG:32633", transform=place, nodata=65535)
    with open_second(root / "second/0.tif", read_header(root / "images/0.tif")) as opened:
        got = opened.read()
    assert np.isnan(got).any()
    assert set(got[~np.isnan(got)].tolist()) == {2000.0}


@pytest.mark.parametrize(
    ("shape", "profile", "said"),
    [
        (
            (40, 36),
            {"crs": "EPSG:32633", "transform": from_origin(600_000, 5_000_000, 0.5, 0.5)},
            "does not overlap the",
        ),
        ((20, 18), {}, "is 18x20 pixels, the image 36x40, and one of them does not say where it lies"),
    ],
)
def test_rasters_that_cannot_be_laid_over_each_other_are_refused(root, shape, profile, said):
    write(root / "second/1.tif", heights(1, shape), **profile)
    with pytest.raises(DataError, match=rf"second/1\.tif {said}"):
        open_it(root).check()


def test_rasters_without_a_system_share_the_one_they_were_written_in(root):
    """As tools leave it that forget the name of the system, of one or both."""
    coarse = from_origin(499_990, 5_000_010, 0.8, 0.8)
    for number in range(3):
        write(root / f"second/{number}.tif", on_grid(coarse, (60, 60)), transform=coarse)
    keys = {"scale": "fixed", "value_range": [0, 200]}
    np.testing.assert_allclose(
        second_of(open_it(root, **keys))[0] * 200, on_grid(UTM["transform"], (40, 36)), atol=0.02
    )
    for number in range(3):
        write(root / f"images/{number}.tif", np.full((3, 40, 36), 9, np.uint8), transform=UTM["transform"])
    np.testing.assert_allclose(
        second_of(open_it(root, **keys))[0] * 200, on_grid(UTM["transform"], (40, 36)), atol=0.02
    )


# --- bands ----------------------------------------------------------------------------------------------------------


def test_a_grey_picture_stored_as_rgba_is_one_band(root):
    grey = (heights() - 200).astype(np.uint8)
    for number in range(3):
        (root / f"second/{number}.tif").unlink()
        write(root / f"second/{number}.png", np.stack([grey] * 3 + [np.full_like(grey, 255)]))
    data = open_it(root)
    assert data.second_bands == (1,)
    np.testing.assert_allclose(second_of(data)[0], minmax(grey), atol=1e-6)


def test_a_damaged_raster_is_found_before_a_training(root):
    path = root / "second/2.tif"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"second/2\.tif: cannot be read as a raster"):
        open_it(root).check(training=True)


def test_further_bands_are_refused_where_nobody_chose(root):
    write(root / "second/1.tif", np.stack([heights(1), heights(2)]), **UTM)
    with pytest.raises(DataError, match=r"second/1\.tif has 2 bands, the second raster of set 's' 1; give files of 1"):
        open_it(root).check()
    for keys in ({"bands": [1]}, {"surplus": "ignore"}):
        data = open_it(root, **keys)
        data.check()
        np.testing.assert_allclose(second_of(data, 1)[0], minmax(heights(1)), atol=1e-6)
    with pytest.raises(DataError, match=r"second/1\.tif has 2 bands"):
        open_it(root, bands=[1], surplus="error").check()


def test_radar_has_two_bands_each_with_its_scale(root):
    radar = np.stack([heights(0) * -0.05, heights(1) * -0.1])
    for number in range(3):
        write(root / f"second/{number}.tif", radar, **UTM)
    data = open_it(root)
    assert data.channels == (3, 2)
    np.testing.assert_allclose(second_of(data), [minmax(band) for band in radar], atol=1e-5)
    np.testing.assert_allclose(second_of(open_it(root, bands=[2])), [minmax(radar[1])], atol=1e-5)
    with pytest.raises(DataError, match=r"0\.tif has 2 bands, of which \[3\] are to be read as second raster"):
        open_it(root, bands=[3]).check()


# --- streams --------------------------------------------------------------------------------------------------------


def stream(data, **keys) -> TrainStream:
    keys = {"crop": 24, "batch_size": 3, "augment": AugmentConfig(), "seed": 3, "mean": MEAN, "std": STD} | keys
    return TrainStream(data, **keys)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_image_of_a_stream_is_that_without_a_second_raster(root, labelled):
    """Draws are those of the set alone; colours change in the image only, crops and flips in both."""
    plain = open_set(SetConfig(root=str(root)), name="s", classes=CLASSES, labelled=labelled)
    for iteration in range(6):
        one, two = stream(plain).batch(iteration), stream(open_it(root, labelled=labelled)).batch(iteration)
        assert torch.equal(one.image, two.image[:, :3]) and torch.equal(one.label, two.label) and one.names == two.names
        assert (one.streams, two.streams) == (1, 2) and two.channels == (3, 1)


def test_crops_flips_and_padding_move_both_rasters_alike(root):
    for number in range(3):  # the second raster is the image's first band
        with rasterio.open(root / f"images/{number}.tif") as src:
            write(root / f"second/{number}.tif", src.read(1), **UTM)
    calm = AugmentConfig(photometric=False)
    data = open_it(root, scale="fixed", value_range=[0, 255])
    for iteration in range(4):
        batch = stream(data, crop=48, augment=calm, mean=(0.0,) * 3, std=(1.0,) * 3).batch(iteration)
        there = ~batch.image[:, 3].isnan()
        torch.testing.assert_close(batch.image[:, 3][there], batch.image[:, 0][there], atol=1e-5, rtol=0)
        assert (batch.image[:, 0][~there] == 0).all() and (batch.label[~there] == 255).all()  # filled up: unknown


def test_statistics_of_the_second_raster_may_be_given(root):
    data = open_it(root)
    plain = EvalStream(data, mean=MEAN, std=STD).batch(0)
    given = EvalStream(data, mean=(*MEAN, 0.5), std=(*STD, 0.25)).batch(0)
    torch.testing.assert_close(given.image[:, 3], (plain.image[:, 3] - 0.5) / 0.25)
    assert plain.channels == given.channels == (3, 1)
    with pytest.raises(ConfigError, match=r"3 bands .* \(or 4 with those of the second raster\), but mean has 5"):
        EvalStream(data, mean=(0,) * 5, std=(1,) * 5)


def test_batches_keep_their_channels_on_every_way(root):
    batch = stream(open_it(root)).batch(0)
    assert batch.to("cpu").channels == (3, 1)
    assert [piece.channels for piece in batch.pieces(2)] == [(3, 1)] * 2
    (loaded,) = stream(open_it(root)).loader(0, 1, 1)
    assert torch.equal(loaded.image, batch.image) and loaded.streams == 2


def test_another_second_raster_is_another_fingerprint(root):
    plain = open_set(SetConfig(root=str(root)), name="s", classes=CLASSES).fingerprint()
    with_heights = open_it(root).fingerprint()
    assert len({plain, with_heights, open_it(root, scale="scene").fingerprint()}) == 3
    write(root / "second/0.tif", heights(5), **UTM)
    assert open_it(root).fingerprint() != with_heights


# --- other kinds ----------------------------------------------------------------------------------------------------


def test_generated_scenes_have_heights_in_metres():
    cfg = SetConfig(kind="generated", split="arid", limit=2, first=5, tile=64, second=SecondConfig())
    data = open_set(cfg, name="g")
    drawn = generator.draw_scene("arid", 6, 64)
    item = data.read(1)
    np.testing.assert_allclose(item.image[3], minmax(drawn.elevation), atol=1e-5)
    np.testing.assert_allclose(item.image[:3] * 255, drawn.image, atol=1e-4)
    assert (item.label == drawn.label).all() and data.channels == (3, 1)
    fixed = dataclasses.replace(cfg, second=SecondConfig(scale="fixed", value_range=[40.0, 80.0]))
    part = open_set(fixed, name="g").read(1, Window(4, 6, 20, 30)).image[3]
    np.testing.assert_allclose(part, np.clip((drawn.elevation[4:24, 6:36] - 40) / 40, 0, 1), atol=1e-5)
    bare = open_set(dataclasses.replace(cfg, second=None), name="g")
    assert bare.fingerprint() != data.fingerprint()


def test_scaling_keeps_nan_and_clips():
    values = np.array([[[np.nan, -5.0, 5.0, 20.0]]], np.float32)
    np.testing.assert_allclose(scaled(values, np.array([[0.0, 10.0]])), [[[np.nan, 0, 0.5, 1]]])


# --- real rasters ---------------------------------------------------------------------------------------------------


def test_potsdam_vaihingen_and_sweden_have_heights(shared):
    root = shared / "data/irrg_ndsm_potsdam_vaihingen_sweden"
    isprs = ("impervious_surface", "building", "low_vegetation", "tree", "car", "clutter")
    labels = {"0": "ignore"} | {str(k + 1): name for k, name in enumerate(isprs)}
    for city, labelled, count in (("potsdam", True, 24), ("vaihingen", False, 14), ("sweden", False, 8)):
        second = SecondConfig(images=f"{city}/dsm/*_dsm.png")
        cfg = SetConfig(root=str(root), images=f"{city}/image/*_img.png", masks=f"{city}/label/*_gt.png",
                        label_map=labels, second=second)  # fmt: skip
        data = open_set(cfg, name=city, classes=isprs, labelled=labelled)
        data.check(training=labelled)
        assert len(data) == count and data.channels == (3, 1)
        values = second_of(data)
        assert values.min() == 0 and values.max() == pytest.approx(1)
        if labelled:  # buildings stand above streets
            tall, low = zip(*(_mean_heights(data.read(index), (1, 0)) for index in range(0, count, 3)), strict=True)
            assert np.nanmean(tall) > np.nanmean(low) + 0.2


def _mean_heights(item, classes) -> list[float]:
    return [float(np.mean(item.image[3][item.label == k])) if (item.label == k).any() else np.nan for k in classes]


@pytest.mark.parametrize(
    ("folder", "image", "second", "known", "said"),
    [
        ("uav_field_ortho_dsm", "odm_orthophoto.tif", "dsm.tif", (0.7, 0.95), "pixels of 0.270"),
        ("satellite_ortho_dsm", "ortho_rgb.tif", "dsm.tif", (0.99, 1.0), None),
        ("olinda_landsat7_dem", "L7_ETMs.tif", "olinda_dem_utm25s.tif", (0.95, 1.0), "EPSG:32"),
        ("rmnp_rgb_dem", "rmnp-rgb.tif", "rmnp-dem.tif", (0.1, 0.9), "pixels of 0.00"),
        ("zion_nlcd_srtm", "nlcd.tif", "srtm.tif", (0.5, 1.0), "EPSG:4326, the image EPSG:26912"),
    ],
)
def test_real_rasters_on_other_grids_are_aligned(shared, caplog, folder, image, second, known, said):
    root = shared / "data/coregistered_other_grids" / folder
    bands = [1, 1, 1] if image == "nlcd.tif" else [1, 2, 3]
    cfg = SetConfig(root=str(root), images=image, bands=bands, second=SecondConfig(images=second), nan="ignore")
    data = open_set(cfg, name=folder, labelled=False)
    data.check()
    lines = [record.getMessage() for record in caplog.records]
    assert [bool(re.search("are warped to the images", line)) for line in lines] == ([] if said is None else [True])
    assert said is None or said in lines[0]
    values = second_of(data)
    assert known[0] <= np.isfinite(values).mean() <= known[1]
    assert np.nanmin(values) == 0 and np.nanmax(values) == pytest.approx(1)


def test_sentinel_pairs_with_elevation_and_radar(shared):
    root = shared / "data/s1_s2_dem_lulc_terramind"
    for folder, channels in (("DEM", (3, 1)), ("S1RTC", (3, 2))):
        cfg = SetConfig(root=str(root), images="S2RGB/*.tif", second=SecondConfig(images=f"{folder}/*.tif"))
        data = open_set(cfg, name="s2", labelled=False)
        data.check()
        assert data.channels == channels and len(data) == 5
        for index in range(5):
            values = second_of(data, index)
            assert values.min() == 0 and values.max() == pytest.approx(1)
