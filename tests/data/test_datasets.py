from __future__ import annotations

import dataclasses
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import from_origin

from cegate.config import SetConfig
from cegate.data import climates, generator, pairs, sets
from cegate.data.datasets import open_set
from cegate.data.published.catalogue import CATALOGUE
from cegate.data.rasters import Window, read_header, read_image
from cegate.errors import ConfigError, DataError

CLASSES = ("field", "road", "water")
LOVEDA_CLASSES = CATALOGUE["loveda"].classes


def write(path: Path, array: np.ndarray) -> Path:
    """Write [C, H, W] or [H, W]."""
    array = array[None] if array.ndim == 2 else array
    path.parent.mkdir(parents=True, exist_ok=True)
    driver = {".png": "PNG", ".jpg": "JPEG", ".tif": "GTiff"}[path.suffix]
    count, height, width = array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver=driver, count=count, height=height, width=width, dtype=array.dtype) as dst:
            dst.write(array)
    return path


def image(height=12, width=10, bands=3, dtype=np.uint8, seed=0):
    return (np.random.default_rng(seed).random((bands, height, width)) * 250).astype(dtype)


def mask(height=12, width=10):
    return (np.arange(height * width, dtype=np.uint8) % 3).reshape(height, width)


@pytest.fixture
def folder(tmp_path):
    """Three pairs: images/{1,2,10}.png with masks/{1,2,10}.png."""
    for number in (1, 2, 10):
        write(tmp_path / f"images/{number}.png", image(seed=number))
        write(tmp_path / f"masks/{number}.png", mask())
    return tmp_path


def open_folder(root, classes=CLASSES, **keys):
    return open_set(SetConfig(root=str(root), **keys), name="source", classes=classes)


def test_a_folder_gives_images_in_0_to_1_and_class_indices(folder):
    data = open_folder(folder)
    item = data.read(1)
    assert [data.item_name(k) for k in range(len(data))] == ["1", "2", "10"]
    assert item.image.dtype == np.float32
    assert item.label.dtype == np.uint8
    np.testing.assert_allclose(item.image, image(seed=2) / 255, atol=1e-6)
    assert (item.label == mask()).all()
    assert data.size(1) == (12, 10)
    assert data.classes == CLASSES
    assert data.bands == (1, 2, 3)


@pytest.mark.parametrize("whole", [True, False], ids=["held", "by window"])
def test_a_window_is_a_part_of_the_whole(folder, monkeypatch, whole):
    monkeypatch.setattr(sets, "LARGE_PX", 2**24 if whole else 0)
    data = open_folder(folder)
    window = Window(3, 2, 5, 6)
    part, full = data.read(0, window), data.read(0)
    assert (part.image == full.image[:, 3:8, 2:8]).all()
    assert (part.label == full.label[3:8, 2:8]).all()
    assert (data.read_label(0, window) == part.label).all()


def test_limit_takes_the_first_pairs(folder):
    assert len(open_folder(folder, limit=2)) == 2


def test_wildcards_pair_files_whatever_surrounds_them(tmp_path):
    for tile in ("Tile 2", "Tile 10"):
        for part in ("001", "002"):
            write(tmp_path / f"{tile}/images/p{part}_sat.jpg", image())
            write(tmp_path / f"{tile}/labels/p{part}_gt.png", mask())
    data = open_folder(tmp_path, images="Tile */images/p*_sat.jpg", masks="Tile */labels/p*_gt.png")
    assert [data.item_name(k) for k in range(4)] == ["2/001", "2/002", "10/001", "10/002"]
    assert data.image_path(3) == tmp_path / "Tile 10/images/p002_sat.jpg"


def test_a_double_star_takes_any_depth(tmp_path):
    for place in ("", "a/", "a/b/"):
        write(tmp_path / f"img/{place}x.png", image())
        write(tmp_path / f"msk/{place}x.tif", mask())
    data = open_folder(tmp_path, images="img/**/*.png", masks="msk/**/*.tif")
    assert sorted(data.item_name(k) for k in range(3)) == ["a/b/x", "a/x", "x"]


def test_a_glob_without_wildcards_is_one_pair(tmp_path):
    write(tmp_path / "sat.tif", image())
    write(tmp_path / "gt.tif", mask())
    assert open_folder(tmp_path, images="sat.tif", masks="gt.tif").item_name(0) == "sat"


def test_side_files_are_no_images_to_a_bare_star(folder):
    (folder / "images/1.png.aux.xml").write_text("<x/>")
    (folder / "images/readme.txt").write_text("x")
    assert len(open_folder(folder)) == 3


@given(
    st.lists(st.text("ab1[].-_ ", min_size=1, max_size=5).filter(lambda t: t.strip(". ") == t), min_size=1, unique=True)
)
def test_the_open_part_of_a_glob_is_found_again(texts):
    expression = re.compile(pairs.expression_of("x [!q]*_?/y*.png"))
    for text in texts:
        match = expression.fullmatch(f"x z{text}_7/y{text}.png")
        assert match.groups() == ("z", text, "7", text)


def test_no_files_are_an_error_that_names_root_and_glob(folder):
    with pytest.raises(DataError, match=r"set 'source': no images match .*img/\*; check root=.* and images='img/\*'"):
        open_folder(folder, images="img/*")
    with pytest.raises(DataError, match=r"no masks match"):
        open_folder(folder, masks="masks/*.tif")


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(DataError, match=r"set 'source': root .*nowhere is not a folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="set 'source': root is missing"):
        open_set(SetConfig(), name="source", classes=CLASSES)


def test_a_folder_needs_classes(folder):
    with pytest.raises(ConfigError, match=r"set 'source': a folder needs data\.classes"):
        open_folder(folder, classes=())


@pytest.mark.parametrize(("gone", "kind"), [("masks/2.png", "image"), ("images/2.png", "mask")])
def test_a_file_without_partner_is_named(folder, gone, kind):
    (folder / gone).unlink()
    with pytest.raises(DataError, match=rf"1 of 3 {kind}s have no .*, first .*{kind}s/2\.png; add the missing files"):
        open_folder(folder)


def test_two_files_of_one_name_are_named(folder):
    write(folder / "images/2.tif", image())
    with pytest.raises(DataError, match=r"images/2\.png and .*images/2\.tif are both image '2'"):
        open_folder(folder)


def test_globs_with_different_wildcards_are_refused(folder):
    with pytest.raises(ConfigError, match=r"images='images/\*' and masks='\*/\*' have different wildcards"):
        open_folder(folder, masks="*/*")


def test_an_absolute_glob_is_refused(folder):
    with pytest.raises(ConfigError, match=r"images='/x/\*' is not a glob below root"):
        open_folder(folder, images="/x/*")


def test_a_mask_of_another_size_is_found_by_check_and_by_reading(folder):
    write(folder / "masks/10.png", mask(12, 11))
    data = open_folder(folder)
    message = r"masks/10\.png: the mask is 11x12 pixels, but its image .*images/10\.png is 10x12"
    with pytest.raises(DataError, match=message):
        data.check()
    with pytest.raises(DataError, match=message):
        data.read(2)


def test_check_passes_a_sound_set_and_names_the_first_bad_file(folder):
    open_folder(folder).check()
    (folder / "images/2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/2\.png: cannot be read"):
        open_folder(folder).check()


def test_too_few_bands_are_refused_when_the_set_is_opened(tmp_path):
    write(tmp_path / "images/a.tif", image(bands=2))
    write(tmp_path / "masks/a.tif", mask())
    with pytest.raises(DataError, match=r"a\.tif has 2 bands, band 3 is not there"):
        open_folder(tmp_path)
    data = open_folder(tmp_path, bands=[2, 1, 1])
    np.testing.assert_allclose(data.read(0).image * 255, image(bands=2)[[1, 0, 0]], atol=1e-4)


def test_a_label_outside_the_map_is_named(folder):
    write(folder / "masks/2.png", mask() + np.uint8(5))
    with pytest.raises(DataError, match=r"masks/2\.png: mask values outside the label map: 5"):
        open_folder(folder).read(1)


def test_a_bad_label_map_names_the_set(folder):
    with pytest.raises(ConfigError, match="set 'source': label_map: '1': 'rod' is no class; did you mean 'road'"):
        open_folder(folder, label_map={"1": "rod"})


@pytest.mark.parametrize("keys", [{"bands": [0, 1, 2]}, {"bands": []}, {"limit": 0}, {"value_range": [3, 3]}])
def test_keys_out_of_range_are_named(folder, keys):
    with pytest.raises(ConfigError, match=f"set 'source': {next(iter(keys))}="):
        open_folder(folder, **keys)


def test_16_bit_images_are_scaled_by_percentiles_of_the_set(tmp_path):
    pixels = np.arange(3 * 50 * 40, dtype=np.uint16).reshape(3, 50, 40)
    write(tmp_path / "images/a.tif", pixels)
    write(tmp_path / "masks/a.tif", mask(50, 40))
    data = open_folder(tmp_path)
    expected = np.percentile(pixels.reshape(3, -1), (1, 99), axis=1).T
    np.testing.assert_allclose(data.value_range, expected)
    low, high = expected.T[:, :, None, None]
    np.testing.assert_allclose(data.read(0).image, np.clip((pixels - low) / (high - low), 0, 1), atol=1e-6)


def test_nodata_pixels_do_not_count_for_the_percentiles(tmp_path):
    pixels = np.random.default_rng(0).random((3, 50, 40), np.float32)
    tag = np.finfo(np.float32).min
    hollow = pixels.copy()
    hollow[:, :20], hollow[1] = tag, tag  # the second band has nothing else
    write(tmp_path / "masks/a.tif", mask(50, 40))
    (tmp_path / "images").mkdir()
    profile = {"driver": "GTiff", "height": 50, "width": 40, "count": 3, "dtype": "float32", "nodata": -3.4028235e38}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "images/a.tif", "w", **profile) as dst:
            dst.write(hollow)
    data = open_folder(tmp_path)
    expected = np.percentile(pixels[:, 20:].reshape(3, -1), (1, 99), axis=1).T
    expected[1] = tag
    np.testing.assert_allclose(data.value_range, expected, rtol=1e-6)
    assert np.isfinite(data.read(0).image).all()


def test_a_range_of_another_set_counts_where_there_is_none_of_its_own(tmp_path):
    write(tmp_path / "images/a.tif", np.full((3, 4, 4), 500, np.uint16))
    write(tmp_path / "masks/a.tif", mask(4, 4))
    cfg, like = SetConfig(root=str(tmp_path)), [(0, 1000), (0, 2000), (500, 500)]
    data = open_set(cfg, name="north", classes=CLASSES, like=like)
    assert data.read(0).image[:, 0, 0].tolist() == [0.5, 0.25, 0]
    own = open_set(dataclasses.replace(cfg, value_range=[0, 500]), name="north", classes=CLASSES, like=like)
    assert own.read(0).image.min() == 1
    with pytest.raises(DataError, match="set 'north': pixels are uint16, but the model learns from 8-bit pixels; give"):
        open_set(cfg, name="north", classes=CLASSES, like=[(0, 255)] * 3)
    with pytest.raises(
        DataError, match=r"set 'north': .*a\.tif: pixels of uint16 up to 500 do not fit .* up to 0.7; give"
    ):
        open_set(cfg, name="north", classes=CLASSES, like=[(0, 0.7)] * 3)
    scenes = SetConfig(kind="generated", split="arid")
    with pytest.raises(DataError, match=r"set 'arid': pixels are uint8, but .* of up to 2000; give the set"):
        open_set(scenes, name="arid", like=like)
    with pytest.raises(DataError, match=r"set 'arid': pixels are uint8, but .* of up to 0\.7; give the set"):
        open_set(scenes, name="arid", like=[(0, 0.7)] * 3)


def test_a_given_range_replaces_percentiles(tmp_path):
    write(tmp_path / "images/a.tif", np.full((3, 4, 4), 500, np.uint16))
    write(tmp_path / "masks/a.tif", mask(4, 4))
    assert open_folder(tmp_path, value_range=[0, 1000]).read(0).image.max() == 0.5


def test_files_of_mixed_depth_are_refused(folder):
    write(folder / "images/2.png", image(dtype=np.uint16))
    with pytest.raises(DataError, match=r"images/2\.png: pixels are uint16, but the set's first image has uint8"):
        open_folder(folder).read(1)


def test_nan_pixels_are_refused_or_ignored(tmp_path):
    pixels = image(dtype=np.float32)
    pixels[1, 2, 3] = np.nan
    pixels[0, 5, 5] = np.inf
    path = write(tmp_path / "images/a.tif", pixels)
    write(tmp_path / "masks/a.tif", mask())
    with pytest.raises(DataError, match=rf"{path.name}: 2 of 120 pixels are NaN or infinite.*'source' nan: ignore"):
        open_folder(tmp_path).read(0)
    item = open_folder(tmp_path, nan="ignore").read(0)
    assert np.isfinite(item.image).all()
    assert (item.image[:, 2, 3] == 0).all()
    assert np.argwhere(item.label == 255).tolist() == [[2, 3], [5, 5]]


def test_a_fingerprint_tells_sets_apart(folder):
    plain = open_folder(folder).fingerprint()
    assert plain == open_folder(folder).fingerprint()
    assert plain != open_folder(folder, limit=2).fingerprint()
    assert plain != open_folder(folder, label_map={0: 0, 1: 1, 2: 1}).fingerprint()
    write(folder / "images/2.png", image(14, 10))
    assert plain != open_folder(folder).fingerprint()


def test_memory_is_bounded_and_what_is_read_is_the_readers_own(folder, monkeypatch):
    monkeypatch.setattr(sets, "CACHE_BYTES", 700)  # an image takes 360 bytes, a mask 120
    data = open_folder(folder)
    first = data.read(0)
    first.image[:] = 7
    for index in (1, 2, 0):
        data.read(index)
        assert data._cache.held <= 700
    np.testing.assert_allclose(data.read(0).image, image(seed=1) / 255, atol=1e-6)


def test_a_set_travels_to_another_process_without_what_it_holds(folder):
    data = open_folder(folder)
    data.read(0)
    copy = pickle.loads(pickle.dumps(data))
    assert copy._cache.held == 0
    assert (copy.read(1).image == data.read(1).image).all()


def loveda(root, split="Val/Urban"):
    for number in (0, 11, 2):
        write(root / split / f"images_png/{number}.png", image(9, 8, seed=number))
        write(root / split / f"masks_png/{number}.png", np.arange(72, dtype=np.uint8).reshape(9, 8) % 8)
    return SetConfig(kind="loveda", root=str(root), split=split)


def test_loveda_is_read_as_downloaded(tmp_path):
    data = open_set(loveda(tmp_path), name="target")
    stored = np.arange(72).reshape(9, 8) % 8
    assert data.classes == LOVEDA_CLASSES
    assert [data.item_name(k) for k in range(3)] == ["0", "2", "11"]
    assert (data.read(0).label == np.where(stored == 0, 255, stored - 1)).all()


def test_loveda_follows_the_order_of_given_classes(tmp_path):
    cfg = loveda(tmp_path)
    classes = tuple(reversed(LOVEDA_CLASSES))
    assert open_set(cfg, name="t", classes=classes).read(0).label[0, 1] == 6  # stored 1, background
    with pytest.raises(ConfigError, match=r"'forest'.*data\.classes has other classes than the set: give a label_map"):
        open_set(cfg, name="t", classes=("background", "building", "road", "water", "barren", "agricultural"))


def test_loveda_needs_one_of_its_splits(tmp_path):
    with pytest.raises(ConfigError, match=r"split='Val/Urbn' is none of Train/Urban.*did you mean 'Val/Urban'"):
        open_set(SetConfig(kind="loveda", root=str(tmp_path), split="Val/Urbn"), name="t")


def test_generated_scenes_are_a_set():
    cfg = SetConfig(kind="generated", split="arid", limit=3, first=40, tile=64)
    data = open_set(cfg, name="arid")
    drawn, label = generator.render_scene("arid", 41, 64)
    item = data.read(1)
    assert len(data) == 3
    assert data.classes == climates.CLASSES
    assert item.name == "arid/00041"
    assert (item.label == label).all()
    np.testing.assert_allclose(item.image * 255, drawn, atol=1e-4)
    assert data.fingerprint() != open_set(dataclasses.replace(cfg, first=0), name="arid").fingerprint()
    data.check()


def test_generated_classes_can_be_merged():
    merge = {"0": "other", "1": "other", "2": "other", "3": "road", "4": "ignore"}
    cfg = SetConfig(kind="generated", split="arid", limit=1, tile=64, label_map=merge)
    label = open_set(cfg, name="arid", classes=("other", "road")).read(0).label
    drawn = generator.render_scene("arid", 0, 64)[1]
    assert (label == np.array([0, 0, 0, 1, 255])[drawn]).all()
    with pytest.raises(ConfigError, match="needs the keys 0, 1, 2, 3, 4"):
        open_set(dataclasses.replace(cfg, label_map={"0": "other"}), name="arid", classes=("other", "road"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"split": "aird"}, "split='aird' is no climate.*did you mean 'arid'"),
     ({"split": None}, "split=None is no climate"),
     ({"split": "arid", "tile": 4}, "tile=4"), ({"split": "arid", "bands": [4]}, r"bands=\[4\]"),
     ({"kind": "loveada"}, "kind='loveada' is none of folder.*did you mean 'loveda'")],
)  # fmt: skip
def test_wrong_keys_of_generated_sets_are_named(keys, message):
    with pytest.raises(ConfigError, match=f"set 'x': {message}"):
        open_set(SetConfig(**({"kind": "generated"} | keys)), name="x")


# Every labelled set of the shared collection: how it is opened, its classes, and how many pairs it has.
LAND = ("building", "land", "road", "vegetation", "water")
ROADS = ("background", "road")
ISPRS = ("impervious_surface", "building", "low_vegetation", "tree", "car", "clutter")
ISPRS_MAP = {"0": "ignore"} | {str(k + 1): name for k, name in enumerate(ISPRS)}
DUBAI_COLOURS = {
    "#3C1098": "building", "#8429F6": "land", "#6EC1E4": "road", "#FEDD3A": "vegetation", "#E2A929": "water",
    "#9B9B9B": "ignore", "#000000": "ignore",
}  # fmt: skip
INDIA_COLOURS = {
    "#F3D43C": "building", "#000000": "land", "#00FFFF": "road", "#00FF00": "vegetation", "#00008B": "water",
    "#B6B6B6": "ignore",
}  # fmt: skip
ZURICH = ("background", "road", "building", "trees", "grass", "water")
ZURICH_COLOURS = {
    "#FFFFFF": "background", "#000000": "road", "#646464": "building", "#007D00": "trees", "#00FF00": "grass",
    "#000096": "water",
}  # fmt: skip
GEO = "geotiff/"
SHARED_SETS = {
    "dubai": (
        SetConfig(root="landcover_dubai_india/dubai", images="Tile */images/*.jpg", masks="Tile */labels/*.png"),
        LAND, 45),
    "dubai colours": (
        SetConfig(root="landcover_dubai_india/dubai", images="Tile */images/*.jpg", masks="Tile */masks/*.png",
                  label_map=DUBAI_COLOURS), LAND, 45),
    "india": (SetConfig(root="landcover_dubai_india/india", masks="labels/*"), LAND, 4),
    "epfl": (SetConfig(root="roads/epfl"), ROADS, 48),
    "eth_cil": (SetConfig(root="roads/eth_cil"), ROADS, 48),
    "japan_gsi": (SetConfig(root="roads/japan_gsi"), ROADS, 24),
    "shanghai": (SetConfig(root="roads/shanghai"), ROADS, 24),
    "vegas": (SetConfig(root="roads/vegas"), ROADS, 10),
    "loveda": (SetConfig(kind="loveda", root="loveda_sample", split="Train/Rural"), (), 3),
    "potsdam": (
        SetConfig(root="isprs_sample/potsdam", images="img_dir/train/*.png", masks="ann_dir/train/*.png",
                  label_map=ISPRS_MAP), ISPRS, 1),
    "vaihingen": (
        SetConfig(root="isprs_sample/vaihingen", images="img_dir/train/*.png", masks="ann_dir/train/*.png",
                  label_map=ISPRS_MAP), ISPRS, 1),
    "massachusetts": (
        SetConfig(root=GEO + "massachusetts_buildings", images="*_15.tif", masks="*_15_label.tif"),
        ("background", "building"), 1),
    "zurich": (
        SetConfig(root=GEO + "zurich_summer", images="sat_*.tif", masks="label_*.tif", bands=[3, 2, 1],
                  label_map={"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "6": "water"}), ZURICH, 1),
    "zurich colours": (
        SetConfig(root=GEO + "zurich_summer", images="sat_*.tif", masks="gt_*.tif", bands=[4, 3, 2],
                  label_map=ZURICH_COLOURS), ZURICH, 1),
    "sentinel-1": (
        SetConfig(root=GEO + "sen1floods11", images="S1/*_S1*.tif", masks="Labels/*_Label*.tif", bands=[1, 2, 2],
                  nan="ignore", label_map={"-1": "ignore", "0": 0, "1": 1}), ("land", "water"), 1),
    "sentinel-2": (
        SetConfig(root=GEO + "sen1floods11", images="S2/*_S2*.tif", masks="Labels/*_Label*.tif", bands=[4, 3, 2],
                  label_map={"-1": "ignore", "0": 0, "1": 1}), ("land", "water"), 1),
    "nrcan": (
        SetConfig(root=GEO + "nrcan_building_tiles", images="tiled_image_*.tif", masks="tiled_label_*.tif"),
        ("background", "building"), 2),
    "new_brunswick": (
        SetConfig(root=GEO + "new_brunswick_aerial", images="*of2.tif", masks="*of2_label.tif", ignore=0,
                  label_map={"1": "vegetation", "2": "water", "3": "road", "4": "building"}),
        ("vegetation", "water", "road", "building"), 2),
}  # fmt: skip


def open_shared(shared, name):
    cfg, classes, pairs = SHARED_SETS[name]
    return open_set(dataclasses.replace(cfg, root=str(shared / "data" / cfg.root)), name=name, classes=classes), pairs


@pytest.mark.parametrize("name", SHARED_SETS)
def test_every_shared_set_opens_and_reads(shared, name, caplog):
    data, pairs = open_shared(shared, name)
    assert len(data) == pairs
    data.check(training=True)
    said = [record.getMessage() for record in caplog.records]
    assert all("never occur" in text for text in said), said
    assert bool(said) == (name in ("loveda", "potsdam", "vaihingen"))  # barren, clutter: see the collection's README
    seen = set()
    for index in range(0, len(data), max(1, len(data) // 4)):
        item = data.read(index)
        assert item.image.shape == (3, *item.label.shape) == (3, *data.size(index))
        assert np.isfinite(item.image).all()
        assert 0 <= item.image.min() < 0.5 < item.image.max() <= 1
        seen |= set(np.unique(item.label).tolist())
    assert seen <= {*range(len(data.classes)), 255}
    assert len(seen - {255}) > 1


def test_dubai_colour_masks_give_the_ids_of_labels(shared):
    colours, _ = open_shared(shared, "dubai colours")
    ids, _ = open_shared(shared, "dubai")
    for index in range(0, 45, 4):  # palette files in tiles 2 and 4, RGB files in the others
        assert (colours.read_label(index) == ids.read_label(index)).all()


def test_india_colour_masks_give_the_ids_of_labels_where_sizes_agree(shared):
    ids, _ = open_shared(shared, "india")
    root = shared / "data/landcover_dubai_india/india"
    cfg = SetConfig(root=str(root), images="images/*hindon*", masks="masks/*hindon*", label_map=INDIA_COLOURS)
    colours = open_set(cfg, name="india", classes=LAND)
    names = [ids.item_name(k) for k in range(4)]
    assert (colours.read_label(0) == ids.read_label(names.index("image_hindon_001"))).all()
    everything = open_set(dataclasses.replace(cfg, images="images/*", masks="masks/*"), name="india", classes=LAND)
    with pytest.raises(DataError, match=r"jewar_003\.png: the mask is \d+x\d+ pixels"):
        everything.check()


def test_zurich_colours_give_the_ids_of_label(shared):
    colours, _ = open_shared(shared, "zurich colours")
    ids, _ = open_shared(shared, "zurich")
    assert (colours.read_label(0) == ids.read_label(0)).all()


def test_the_alpha_band_of_eth_cil_is_left_out(shared):
    data, _ = open_shared(shared, "eth_cil")
    assert read_header(data.image_path(0)).bands == 4
    assert np.array_equal((data.read(0).image * 255).round(), read_image(data.image_path(0))[:3])


def test_zurich_is_16_bit_and_scaled_per_band(shared):
    data, _ = open_shared(shared, "zurich")
    assert len(set(data.value_range)) == 3
    assert data.value_range == open_shared(shared, "zurich")[0].value_range
    assert 0.1 < data.read(0).image.mean() < 0.7


def test_nan_in_sentinel_1_is_refused_unless_it_is_ignored(shared, tmp_path):
    whole, _ = open_shared(shared, "sentinel-1")  # its nodata tag is NaN, but no pixel is
    stored = whole.read_label(0)
    with rasterio.open(whole.image_path(0)) as src:
        pixels, profile = src.read(), src.profile
    pixels[1, stored == 255] = np.nan
    pixels[:, 100, 100:110] = np.nan
    with rasterio.open(tmp_path / "a_S1.tif", "w", **profile) as dst:
        dst.write(pixels)
    (tmp_path / "a_Label.tif").symlink_to(next((shared / "data/geotiff/sen1floods11/Labels").iterdir()))
    cfg, classes, _ = SHARED_SETS["sentinel-1"]
    cfg = dataclasses.replace(cfg, root=str(tmp_path), images="*_S1.tif", masks="*_Label.tif")
    with pytest.raises(DataError, match=r"a_S1\.tif: 109 of 262144 pixels are NaN"):
        open_set(dataclasses.replace(cfg, nan="error"), name="s1", classes=classes).read(0)
    item = open_set(cfg, name="s1", classes=classes).read(0)
    assert (item.label == 255).sum() == 109
    assert (item.image[:, 100, 100:110] == 0).all()
    assert (item.label[item.label != 255] == stored[item.label != 255]).all()


def test_a_nodata_tag_of_0_leaves_the_background_of_nrcan(shared):
    data, _ = open_shared(shared, "nrcan")
    assert (data.read(0).label == 0).mean() > 0.9


def test_a_mask_that_lies_elsewhere_is_said_once_for_the_set(tmp_path, caplog):
    for number, left in enumerate((500.0, 500.4, 650.0, 700.0)):
        for kind, x, array in (("images", 500.0, image()), ("masks", left, mask()[None])):
            path = tmp_path / kind / f"{number}.tif"
            path.parent.mkdir(exist_ok=True)
            size = {"height": 12, "width": 10, "count": len(array), "dtype": "uint8"}
            with rasterio.open(path, "w", driver="GTiff", transform=from_origin(x, 9000, 0.5, 0.5), **size) as dst:
                dst.write(array)
    open_folder(tmp_path).check()
    (record,) = caplog.records
    said = r"2 of 4 masks do not lie where their images do, the first is .*masks/2\.tif \(300\.0 px off\)"
    assert re.search(said, record.getMessage())
    (tmp_path / "masks/2.tif").unlink(), (tmp_path / "images/2.tif").unlink()
    (tmp_path / "masks/3.tif").unlink(), write(tmp_path / "masks/3.tif", mask())
    caplog.clear()
    open_folder(tmp_path).check()
    assert caplog.records == []
