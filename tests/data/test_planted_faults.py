"""Faults as people's data have them, each planted in an otherwise clean set: all are found, and none where none is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from cegate.config import SetConfig
from cegate.data import rasters
from cegate.data.datasets import open_set
from cegate.data.stream import EvalStream
from cegate.data.survey import survey
from cegate.errors import CegateError, ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = ("field", "road")
COUNT = 6


def write(path: Path, array: np.ndarray, *, names: tuple[str, ...] = (), **profile) -> Path:
    array = array[None] if array.ndim == 2 else array
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    driver = {".png": "PNG", ".tif": "GTiff"}[path.suffix]
    shape = {"driver": driver, "count": count, "height": height, "width": width, "dtype": str(array.dtype)}
    with rasterio.open(path, "w", **shape | profile) as dst:
        dst.write(array)
        for band, name in enumerate(names, 1):
            dst.set_band_description(band, name)
    return path


def picture(number: int = 0, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(1, 250, (bands, 24, 20), dtype=np.uint8)


LABEL = (np.indices((24, 20)).sum(0) // 6 % 2).astype(np.uint8)
PLACE = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.5, 0.5)}


def images_of(change: Callable[[np.ndarray], np.ndarray], **profile) -> Callable[[Path], None]:
    """Every image anew, as a TIFF."""

    def plant(root: Path) -> None:
        shutil.rmtree(root / "images")
        for number in range(COUNT):
            write(root / f"images/{number}.tif", change(picture(number)), **profile)

    return plant


def masks_of(change: Callable[[np.ndarray], np.ndarray], suffix: str = ".png", **profile) -> Callable[[Path], None]:
    """Every mask anew."""

    def plant(root: Path) -> None:
        shutil.rmtree(root / "masks")
        for number in range(COUNT):
            write(root / f"masks/{number}{suffix}", change(LABEL), **profile)

    return plant


def placed(mask: dict) -> Callable[[Path], None]:
    """Images that lie somewhere, and masks that lie there or elsewhere."""

    def plant(root: Path) -> None:
        images_of(lambda image: image, **PLACE)(root)
        masks_of(lambda label: label, ".tif", **mask)(root)

    return plant


def two_pages(root: Path) -> None:
    images_of(lambda image: image)(root)
    for number in range(COUNT):
        with rasterio.open(f"GTIFF_DIR:1:{root}/images/{number}.tif") as src:
            pixels = src.read()
        from PIL import Image

        pages = [Image.fromarray(pixels.transpose(1, 2, 0)) for _ in range(2)]
        pages[0].save(root / f"images/{number}.tif", save_all=True, append_images=pages[1:])


def with_nodata(tag: float | None) -> Callable[[Path], None]:
    """float64 images whose corner holds the lowest number there is."""
    lowest = np.finfo(np.float64).min

    def hollow(image: np.ndarray) -> np.ndarray:
        pixels = image.astype(np.float64)
        pixels[:, :8] = lowest
        return pixels

    return images_of(hollow, **({} if tag is None else {"nodata": tag}))


def hollow_images(value: np.generic, dtype: type, **profile) -> Callable[[Path], None]:
    """Images of which two fifths are one value."""
    return images_of(lambda image: np.where(np.arange(20) < 8, value, image.astype(dtype)), **profile)


def hollow_scene(root: Path) -> None:
    """A pair of 10^12 pixels that were never written."""
    for kind, count in (("images", 3), ("masks", 1)):
        shape = {"height": 10**6, "width": 10**6, "count": count, "dtype": "uint8"}
        options = {"tiled": True, "blockxsize": 4096, "blockysize": 4096, "sparse_ok": True, "bigtiff": "yes"}
        with rasterio.open(root / f"{kind}/9.tif", "w", driver="GTiff", compress="deflate", **shape, **options):
            pass


class Fault(NamedTuple):
    """What is done to a set, what must be said, and how the set is opened."""

    plant: Callable[[Path], object]
    said: str
    keys: dict = {}  # noqa: RUF012 - never written to
    classes: tuple[str, ...] = CLASSES


FAULTS = {
    "masks 0/255": Fault(
        masks_of(lambda label: label * 255),
        r"masks hold 0 and 255 .*'road' never occurs; .*label_map: \{0: field, 255: road\}",
    ),
    "masks 0/255 in three bands": Fault(
        masks_of(lambda label: np.stack([label * 255] * 3)), r"label_map: \{0: field, 255: road\}"
    ),
    "masks 1/2": Fault(
        masks_of(lambda label: label + 1), r"values outside the label map: 2 .*perhaps label_map: \{1: field, 2: road"
    ),
    "all ignored": Fault(masks_of(lambda label: label * 0 + 255), "every pixel looked at is ignored"),
    "all ignored by the map": Fault(
        masks_of(lambda label: label * 0), "every pixel looked at is ignored", {"label_map": {0: "ignore", 1: "road"}}
    ),
    "a class that never occurs": Fault(
        lambda root: None, r"'water' never occurs \(in all masks\)", {}, ("field", "road", "water")
    ),
    "ignore hides a class": Fault(lambda root: None, "ignore: 0 hides class 'field'", {"ignore": 0}),
    "one-hot mask of two bands": Fault(
        masks_of(lambda label: np.stack([1 - label, label]), ".tif"), r"a mask of 2 bands, one for each class \(one-h"
    ),
    "one-hot mask of two bands as PNG": Fault(
        masks_of(lambda label: np.stack([1 - label, label]) * 255), r"a mask of 2 bands, one for each class"
    ),
    "one-hot mask of five bands": Fault(
        masks_of(lambda label: np.stack([label * 0] * 3 + [1 - label, label]), ".tif"), "a mask of 5 bands, one for"
    ),
    "complex radar": Fault(images_of(lambda image: image.astype(np.complex64)), "are complex64.*write amplitude"),
    "thirteen bands": Fault(
        images_of(lambda image: picture(1, 13).astype(np.uint16) * 20, names=tuple(f"B{k}" for k in range(1, 14))),
        r"images have 13 bands \(B1, B2, .*B13\), of which 1 B1, 2 B2, 3 B3 are read, values \d+.* to \d+.*; set bands",
    ),
    "infrared as a fourth band": Fault(
        images_of(lambda image: picture(1, 4), photometric="minisblack"), "images have 4 bands .* set bands to choose"
    ),
    "masks in another place": Fault(
        placed(PLACE | {"transform": from_origin(500_300, 5_000_000, 0.5, 0.5)}), r"6 of 6 masks do not .*\(600\.0 px"
    ),
    "masks in another system": Fault(
        placed({"crs": "EPSG:4326", "transform": from_origin(15.0, 45.0, 1e-5, 1e-5)}), "6 of 6 masks do not lie where"
    ),
    "mixed types": Fault(
        lambda root: write(root / "images/4.png", picture().astype(np.uint16)), r"4\.png: pixels are uint16, but .*ui"
    ),
    "a broken link": Fault(
        lambda root: (root / "images/9.png").symlink_to(root / "gone.png"), r"9\.png is a link to .*gone\.png, which"
    ),
    "a broken link to a folder": Fault(
        lambda root: (root / "more").symlink_to(root / "gone"),
        "more is a link to .*gone, which is not there",
        {"images": "**/images/*.png", "masks": "**/masks/*.png"},
    ),
    "a VRT in disguise": Fault(
        lambda root: (root / "images/0.png").write_text("<VRTDataset><A/></VRTDataset>"),
        r"0\.png is a VRT and not opened",
    ),
    "several images in a file": Fault(two_pages, r"0\.tif holds 2 images; the first is read"),
    "a mask of another size": Fault(lambda root: write(root / "masks/5.png", LABEL[:9]), "the mask is 20x9 pixels"),
    "nodata without a tag in floats": Fault(
        hollow_images(np.float32(-9999), np.float32), r"40\.0 % of the pixels are -9999, far from .*\(bands 1, 2, 3\)"
    ),
    "nodata without a tag in integers": Fault(
        hollow_images(np.uint16(65535), np.uint16), r"40\.0 % of the pixels are 65535, far from .*-a_nodata 65535"
    ),
    "masks of fractions": Fault(
        masks_of(lambda label: label + np.float32(0.5), ".tif"), r"outside the label map: 0\.5 .* with an .* is none$"
    ),
    "masks of NaN": Fault(
        masks_of(lambda label: np.where(label, np.float32("nan"), label).astype(np.float32), ".tif"),
        r"outside the label map: nan .* with an integer that is ignored where there is none$",
    ),
    "a scene that was never written": Fault(hollow_scene, r"9\.tif is 1000000x1000000 pixels by its header, 3 TB, but"),
    "NaN": Fault(images_of(lambda image: image / np.float32(0)), "no finite pixel"),
}  # fmt: skip

HARMLESS = {
    "nothing": lambda root: None,
    "hidden files": lambda root: [(root / f"images/._{k}.png").write_bytes(b"\0\5\x16\7") for k in range(COUNT)],
    "notebook left-overs": lambda root: write(root / "images/.ipynb_checkpoints/0-checkpoint.png", picture()),
    "a folder named like an image": lambda root: (root / "images/x.tif").mkdir(),
    "an archive's left-overs": lambda root: write(root / "images/__MACOSX/0.png", picture()),
    "an opaque alpha band": images_of(lambda image: np.concatenate((image, np.full_like(image[:1], 255))), alpha="yes"),
    "masks with an alpha band": masks_of(lambda label: np.stack([label, np.full_like(label, 255)])),
    "masks with ignored pixels": masks_of(lambda label: np.where(np.arange(20) < 3, np.uint8(255), label)),
    "masks in the same place": placed(PLACE),
    "masks that say nothing of their place": placed({}),
    "nodata with its tag": hollow_images(np.float32(-9999), np.float32, nodata=-9999),
    "a scene whose border is 0": hollow_images(np.uint16(0), np.uint16),
    "float64 nodata with its tag": with_nodata(np.finfo(np.float64).min),
    "float64 nodata without a tag": with_nodata(None),
    "float64 nodata with a tag of fewer digits": with_nodata(-1.79769313486e308),
}


@pytest.fixture
def root(tmp_path) -> Path:
    for number in range(COUNT):
        write(tmp_path / f"images/{number}.png", picture(number))
        write(tmp_path / f"masks/{number}.png", LABEL)
    return tmp_path


def look(root: Path, caplog: pytest.LogCaptureFixture, classes: tuple[str, ...] = CLASSES, **keys) -> tuple[list, list]:
    """What opening and checking a set says, and what was read from it."""
    said, items = [], []
    try:
        data = open_set(SetConfig(root=str(root), **keys), name="source", classes=classes)
        data.check(training=True)
        items = [data.read(index) for index in range(len(data))]
    except CegateError as error:
        said.append(str(error))
    return [*said, *(record.getMessage() for record in caplog.records)], items


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_said_in_a_line(root, caplog, name):
    fault = FAULTS[name]
    fault.plant(root)
    said, _ = look(root, caplog, fault.classes, **fault.keys)
    assert len(said) == 1, said
    assert re.search(fault.said, said[0]), said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_is_invented_where_nothing_is_wrong(root, caplog, name):
    HARMLESS[name](root)
    said, items = look(root, caplog)
    assert said == []
    assert len(items) == COUNT
    for number, item in enumerate(items):
        known = item.label != 255
        assert (item.label[known] == LABEL[known]).all() and known.mean() > 0.8
        assert np.isfinite(item.image).all()
        if "nodata" not in name and "border" not in name:
            np.testing.assert_allclose(item.image * 255, picture(number), atol=1e-3)


def test_a_scene_that_was_never_written_is_odd_and_not_looked_at(root):
    hollow_scene(root)
    found = survey(root)
    assert any(
        re.search(r"1 of 7 pairs cannot be used, first: .*9\.tif is 1000000x1000000", line) for line in found.odd
    )


def test_pixels_that_memory_does_not_hold_are_that_image_s_failure(root, monkeypatch):
    """As those of a scene that is evaluated whole."""
    monkeypatch.setattr(rasters, "_HOLLOW_BYTES", 1 << 60)
    hollow_scene(root)
    with pytest.raises(
        DataError, match=r"images/9\.tif: 1000000x1000000 pixels do not fit into the memory; cut it into"
    ):
        rasters.read_image(root / "images/9.tif")
    with pytest.raises(DataError, match=r"masks/9\.tif: 1000000x1000000 pixels do not fit into the memory"):
        rasters.read_mask(root / "masks/9.tif", classes=CLASSES)


@pytest.mark.parametrize("tag", [None, np.finfo(np.float64).min, -1.79769313486e308], ids=str)
def test_pixels_of_the_lowest_float64_become_0_and_the_others_keep_their_scale(root, tag):
    with_nodata(tag)(root)
    data = open_set(SetConfig(root=str(root)), name="source", classes=CLASSES)
    (low, high), *_ = data.value_range
    assert 0 < low < 30 and 220 < high < 250
    image = data.read(2).image
    assert (image[:, :8] == 0).all()
    bounds = np.array(data.value_range).T[:, :, None, None]
    expected = np.clip((picture(2)[:, 8:] - bounds[0]) / (bounds[1] - bounds[0]), 0, 1)
    np.testing.assert_allclose(image[:, 8:], expected, atol=1e-6)
    assert EvalStream(data, mean=[0.5] * 3, std=[0.2] * 3).batch(0).image.isfinite().all()


@pytest.mark.parametrize("globs", [("./images/*", "./masks/*"), ("images//*", ".//masks/./*"), ("**/images/*",) * 2])
def test_globs_may_be_written_in_any_way(root, globs):
    images, masks = globs
    data = open_set(
        SetConfig(root=str(root), images=images, masks=masks.replace("images", "masks")), name="s", classes=CLASSES
    )
    assert len(data) == COUNT


def test_letters_in_brackets_are_those_of_a_glob(root):
    for images, count in (("images/[0-2].png", 3), ("images/[!0-2].png", 3), (r"images/[\4].png", 1)):
        keys = {"images": images, "masks": images.replace("images", "masks")}
        assert len(open_set(SetConfig(root=str(root), **keys), name="s", classes=CLASSES)) == count
    with pytest.raises(ConfigError, match=r"'\[z-a\]', which stands for no letters"):
        open_set(SetConfig(root=str(root), images="[z-a]/*", masks="[z-a]/*"), name="s", classes=CLASSES)
    for nothing in ("images/[!].png", "images/[].png", "images/[a.png"):
        with pytest.raises(DataError, match="no images match"):
            open_set(SetConfig(root=str(root), images=nothing, masks=nothing), name="s", classes=CLASSES)


def test_linked_folders_count_below_double_stars_and_circles_end(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "images/a.png", picture())
    write(elsewhere / "masks/a.png", LABEL)
    (root / "there").symlink_to(elsewhere)
    (root / "images/up").symlink_to(root)
    keys = {"images": "**/images/*.png", "masks": "**/masks/*.png"}
    data = open_set(SetConfig(root=str(root), **keys), name="s", classes=CLASSES)
    assert [data.item_name(k) for k in range(len(data))] == [*map(str, range(COUNT)), "there/a"]


def test_hidden_files_count_where_the_glob_spells_the_dot(root):
    for kind, array in (("images", picture()), ("masks", LABEL)):
        write(root / f".cache/{kind}/a.png", array)
    keys = {"images": ".cache/images/*", "masks": ".cache/masks/*"}
    assert len(open_set(SetConfig(root=str(root), **keys), name="s", classes=CLASSES)) == 1


def test_an_evaluated_set_may_lack_a_class(root, caplog):
    data = open_set(SetConfig(root=str(root)), name="t", classes=("field", "road", "water"), like=[(0, 255)] * 3)
    data.check()
    assert caplog.records == []


def test_thin_classes_of_large_masks_are_seen_and_few_masks_are_looked_at(tmp_path, caplog, monkeypatch):
    from cegate.data import preflight

    label = np.zeros((1700, 1700), np.uint8)
    label[:, 800] = 1
    for number in range(50):
        write(tmp_path / f"images/{number}.png", np.zeros((3, 8, 8), np.uint8))
        write(tmp_path / f"masks/{number}.png", label[:8, :8])
    write(tmp_path / "masks/0.png", label), write(tmp_path / "images/0.png", np.zeros((3, 1700, 1700), np.uint8))
    looked, read = [], preflight.read_codes
    monkeypatch.setattr(preflight, "read_codes", lambda path, **k: looked.append(path) or read(path, **k))
    open_set(SetConfig(root=str(tmp_path)), name="source", classes=CLASSES).check(training=True)
    assert caplog.records == []
    assert len(set(looked)) == 36
    assert looked.count(tmp_path / "masks/0.png") == 9


def test_an_exchanged_file_of_equal_name_and_size_changes_the_fingerprint(tmp_path):
    for number in range(3):
        write(tmp_path / f"images/{number}.tif", picture(number))
        write(tmp_path / f"masks/{number}.tif", LABEL)
    open_it = lambda: open_set(SetConfig(root=str(tmp_path)), name="s", classes=CLASSES)  # noqa: E731
    before = open_it()
    recorded, of_last, of_old = (before.fingerprint(version) for version in (3, 2, 1))
    assert before.fingerprint() == recorded
    assert recorded.startswith("3:") and of_last.startswith("2:") and re.fullmatch(r"[0-9a-f]{64}", of_old)
    assert all(map(before.has_fingerprint, (recorded, of_last, of_old)))
    write(tmp_path / "masks/1.tif", LABEL.T.reshape(24, 20))
    after = open_it()
    assert not after.has_fingerprint(recorded)
    assert after.has_fingerprint(of_old)  # as far as it could see
    copied = shutil.copytree(tmp_path, tmp_path / "copy/of", ignore=lambda *_: ["copy"])
    assert open_set(SetConfig(root=str(copied)), name="s", classes=CLASSES).has_fingerprint(after.fingerprint())


@pytest.mark.parametrize(("side", "rows"), [(24, 1), (700, 70)])
def test_changed_rows_anywhere_in_a_file_change_the_fingerprint(tmp_path, side, rows):
    """Files are not compressed, so that sizes stay."""
    open_it = lambda: open_set(SetConfig(root=str(tmp_path)), name="s", classes=CLASSES)  # noqa: E731
    pixels = np.random.default_rng(0).integers(0, 250, (3, side, side), np.uint8)
    write(tmp_path / "masks/0.tif", np.zeros((side, side), np.uint8))
    seen = set()
    for top in (None, 0, side // 3, side - rows):
        changed = pixels.copy()
        if top is not None:
            changed[:, top : top + rows] += 1
        write(tmp_path / "images/0.tif", changed)
        seen.add(open_it().fingerprint())
    assert len(seen) == 4
