"""What is known of the published sets: counts, splits, colours, label tables."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cegate.data.published import casid, labels
from cegate.data.published.catalogue import CATALOGUE, find_published
from cegate.data.published.downloads import Member, find
from cegate.data.published.labels import ISPRS_COLOURS, label_reader, recode, to_bytes
from cegate.data.published.miniature import CROPS, MINIATURES
from cegate.data.published.plan import crop_boxes, grid_starts
from cegate.data.rasters import write_image, write_mask
from cegate.errors import ConfigError, DataError


def reader(name: str, **options: str):
    """The reader of a set's labels."""
    published = CATALOGUE[name]
    return label_reader(published.row, published.stored, published.parse_options(options))


def tiles(name: str, split: str) -> list[str]:
    return CATALOGUE[name].row["tiles"][split].split()


def colour_codes(text: str) -> list[int]:
    """0xRRGGBB of "(r,g,b) (r,g,b) ..."."""
    return [int(r) << 16 | int(g) << 8 | int(b) for r, g, b in re.findall(r"\((\d+),(\d+),(\d+)\)", text)]


# --- the grid -------------------------------------------------------------------------------------------------------


def test_a_grid_has_a_last_crop_at_the_end_only_where_something_is_left():
    assert grid_starts(1024, 512) == [0, 512]
    assert grid_starts(5000, 1024) == [0, 1024, 2048, 3072, 3976]
    assert grid_starts(512, 512) == [0]
    assert crop_boxes(600, 512, 512) == [(0, 0, 512, 512), (0, 88, 512, 600)]
    with pytest.raises(DataError, match="a side of 500 px is shorter than the crop of 512 px; give --crop 500 or less"):
        grid_starts(500, 512)


@given(st.integers(1, 300), st.integers(1, 50))
def test_a_grid_covers_the_side_with_as_few_crops_as_can(side, crop):
    if side < crop:
        return
    starts = grid_starts(side, crop)
    assert len(starts) == math.ceil(side / crop)
    assert starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] == side - crop
    assert all(b - a <= crop for a, b in pairwise(starts))


def test_published_crop_counts_follow_from_tile_sizes(vaihingen_sizes):
    counts = CATALOGUE["isprs-potsdam"].splits
    per_tile = len(crop_boxes(6000, 6000, 512))
    assert counts["RGB/train"].files == per_tile * len(tiles("isprs-potsdam", "train")) == 3456
    assert counts["IRRG/val"].files == per_tile * len(tiles("isprs-potsdam", "val")) == 2016
    crops = {area: len(crop_boxes(*size, 512)) for area, size in vaihingen_sizes.items()}
    counts = CATALOGUE["isprs-vaihingen"].splits
    assert counts["train"].files == sum(crops[area] for area in tiles("isprs-vaihingen", "train")) == 344
    assert counts["val"].files == sum(crops[area] for area in tiles("isprs-vaihingen", "val")) == 398
    per_image = len(crop_boxes(5000, 5000, CATALOGUE["casid"].row["crop"]))
    assert all(c.files == per_image * c.images == 25 * c.images for c in CATALOGUE["casid"].splits.values())
    assert len(crop_boxes(1024, 1024, 512)) == 4


def test_splits_and_counts_are_the_published_ones():
    found = {
        name: {split: (c.images, c.files) for split, c in published.splits.items()}
        for name, published in CATALOGUE.items()
    }
    potsdam = {"RGB/train": (24, 3456), "RGB/val": (14, 2016), "IRRG/train": (24, 3456), "IRRG/val": (14, 2016)}
    assert found == {
        "isprs-potsdam": potsdam,
        "potsdam-rescue": potsdam,
        "isprs-vaihingen": {"train": (16, 344), "val": (17, 398)},
        "loveda": {
            "Train/Urban": (1156, 4624), "Train/Rural": (1366, 5464), "Val/Urban": (677, 2708), "Val/Rural": (992, 3968)
        },
        "rescuenet": {"train": (3595, 3595), "val": (449, 449), "test": (450, 450)},
        "whu": {
            "aerial/train": (4736, 4736), "aerial/val": (1036, 1036), "aerial/test": (2416, 2416),
            "satellite/train": (13662, 13662), "satellite/test": (3726, 3726),
        },
        "deepglobe": {"train": (6226, 6226)},
        "massachusetts": {"train": (1108, 1108), "val": (14, 14), "test": (49, 49)},
        "casid": {
            "SubMs/train": (196, 4900), "SubMs/test": (88, 2200), "TemMs/train": (201, 5025), "TemMs/test": (83, 2075),
            "TroMs/train": (136, 3400), "TroMs/test": (66, 1650), "TroRf/train": (148, 3700), "TroRf/test": (62, 1550),
        },
        "mmhunan": {"train": (450, 450), "test": (50, 50)},
        "isprs-potsdam-dsm": {"RGB/train": (18, 18), "RGB/test": (6, 6)},
        "isprs-vaihingen-dsm": {"train": (12, 12), "test": (4, 4)},
    }  # fmt: skip
    assert sum(counts.images for counts in CATALOGUE["casid"].splits.values()) == 980
    assert len({*tiles("isprs-potsdam", "train"), *tiles("isprs-potsdam", "val")}) == 38
    assert len({*tiles("isprs-vaihingen", "train"), *tiles("isprs-vaihingen", "val")}) == 33
    assert len(set(CATALOGUE["mmhunan"].row["listed"]["names"].split())) == 50
    for city in ("potsdam", "vaihingen"):  # MFNet splits what everybody trains on
        both = [*tiles(f"isprs-{city}-dsm", "train"), *tiles(f"isprs-{city}-dsm", "test")]
        assert sorted(both) == sorted(tiles(f"isprs-{city}", "train"))


def test_every_entry_is_whole():
    for name, published in CATALOGUE.items():
        assert len(published.classes) == len(published.palette) == len(set(published.palette)), name
        assert set(published.stored.values()) <= {*published.classes, "ignore"}
        assert published.origin and published.layout and name in MINIATURES
        assert ("crop" in published.settings) == (name in CROPS)
    with pytest.raises(ConfigError, match=r"no data set is called 'isprs-potsdm'.*did you mean 'isprs-potsdam'"):
        find_published("isprs-potsdm")


def test_palettes_are_the_published_colours():
    palettes = {
        "isprs-potsdam": "(255,255,255) (0,0,255) (0,255,255) (0,255,0) (255,255,0) (255,0,0)",
        "potsdam-rescue": "(255,255,255) (0,0,255) (0,255,0) (255,255,0) (255,0,0)",
        "loveda": "(255,255,255) (255,0,0) (255,255,0) (0,0,255) (159,129,183) (0,255,0) (255,195,128)",
        "casid": "(0,0,0) (255,255,0) (85,255,0) (255,0,0) (0,112,255)",
        "mmhunan": "(196,90,17) (51,129,88) (177,205,61) (228,84,96) (91,154,214) (225,174,110) (239,159,2)",
        "whu": "(0,0,0) (255,255,255)",
    }
    for name, colours in palettes.items():
        assert [int(colour[1:], 16) for colour in CATALOGUE[name].palette] == colour_codes(colours), name
    raw = (
        "(0,0,0) (61,230,250) (180,120,120) (235,255,7) (255,184,6) (255,0,0) (255,0,245) (140,140,140) (160,150,20) "
        "(4,250,7) (255,235,0)"
    )
    assert [int(c, 16) for c in CATALOGUE["rescuenet"].row["raw_colours"].split()] == colour_codes(raw)
    isprs = [int(colour[1:], 16) for colour in CATALOGUE["isprs-potsdam"].palette]
    assert list(ISPRS_COLOURS) == [0, *isprs]


# --- labels ---------------------------------------------------------------------------------------------------------


def paint(path, codes):
    """Write [H, W] 0xRRGGBB as an RGB PNG."""
    codes = np.atleast_2d(np.array(codes))
    write_image(path, np.stack((codes >> 16, codes >> 8 & 255, codes & 255)).astype(np.uint8))
    return path


def values(path, *stored):
    write_mask(path, np.array([stored], np.uint8))
    return path


def test_isprs_colours_become_ids_and_others_are_ignored_and_counted(tmp_path):
    codes = [0, *colour_codes("(255,255,255) (0,0,255) (0,255,255) (0,255,0) (255,255,0) (255,0,0)"), 0xFEFFFF]
    label = reader("isprs-potsdam")(paint(tmp_path / "a.png", codes))
    assert label.ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]]
    assert label.unknown_px == 1


@pytest.mark.parametrize(("option", "expected"), [("ignore", [0, 1, 2, 0, 3, 4, 5]), ("merge", [0, 1, 2, 3, 3, 4, 5])])
def test_potsdam_in_unified_classes(tmp_path, option, expected):
    path = paint(tmp_path / "a.png", ISPRS_COLOURS)
    assert reader("potsdam-rescue", low_vegetation=option)(path).ids.tolist() == [expected]


def test_rescuenet_raw_ids_and_colours_become_unified_ids(tmp_path):
    expected, read = [[5, 5, 2, 2, 2, 2, 4, 1, 1, 3, 5]], reader("rescuenet")
    raw = [int(colour, 16) for colour in CATALOGUE["rescuenet"].row["raw_colours"].split()]
    assert read(values(tmp_path / "a.png", *range(11))).ids.tolist() == expected
    assert read(paint(tmp_path / "b.png", raw)).ids.tolist() == expected
    with pytest.raises(DataError, match=r"c\.png: values out of range: 11 \(2 px\), 200 \(1 px\); labels .* hold 0, 1"):
        read(values(tmp_path / "c.png", 11, 3, 200, 11))
    with pytest.raises(DataError, match=r"d\.png: colours out of range: #123456 \(1 px\)"):
        read(paint(tmp_path / "d.png", [0, 0x123456]))


@pytest.mark.parametrize(
    ("label_map", "expected"),
    [
        ("dataset", [255, 0, 1, 2, 1, 3, 4, 6, 6, 5, 6, 255, 255, 255]),
        ("mfnet", [255, 0, 1, 2, 255, 3, 4, 255, 5, 6, 255, 255, 255, 255]),
    ],
)
def test_mmhunan_has_two_tables(tmp_path, label_map, expected):
    path = values(tmp_path / "a.png", *range(13), 255)
    read = reader("mmhunan", label_map=label_map)
    assert read(path).ids.tolist() == [expected]
    with pytest.raises(DataError, match=r"b\.png: values out of range: 13 \(1 px\)"):
        read(values(tmp_path / "b.png", 1, 13))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [((0, 255, 127, 128), [0, 1, 0, 1]), ((0, 1, 1), [0, 1, 1]), ((0, 0), [0, 0]), ((3, 90), [0, 0])],
)
def test_masks_of_one_class_are_bright_where_it_is(tmp_path, stored, expected):
    assert labels.read_bright(values(tmp_path / "a.png", *stored)).ids.tolist() == [expected]


def test_casid_ids_less_an_offset_or_colours(tmp_path):
    palette = [int(colour[1:], 16) for colour in CATALOGUE["casid"].palette]
    assert casid.read_label(paint(tmp_path / "a.png", palette), 0, palette).ids.tolist() == [[0, 1, 2, 3, 4]]
    assert casid.read_label(values(tmp_path / "b.png", 0, 4, 255), 0, palette).ids.tolist() == [[0, 4, 255]]
    assert casid.read_label(values(tmp_path / "c.png", 0, 1, 5, 255), 1, palette).ids.tolist() == [[255, 0, 4, 255]]
    with pytest.raises(DataError, match=r"c\.png: values out of range: 5 \(1 px\)"):
        casid.read_label(tmp_path / "c.png", 0, palette)


def test_recoding_floats_and_wide_integers_names_what_is_unknown():
    table = {-1: 255, 0: 0, 2: 1}
    for kind in (np.int8, np.int16, np.float32):
        assert recode("x", np.array([[-1, 2, 0]], kind), table).tolist() == [[255, 1, 0]]
        with pytest.raises(DataError, match=r"x: values out of range: 7 \(2 px\), 1 \(1 px\); labels .* hold -1, 0, 2"):
            recode("x", np.array([[7, 1, 7]], kind), table)


def test_stretching_rounds_down_and_survives_flat_and_missing_pixels():
    image = np.array([[[10, 20, 13]], [[5, 5, 5]], [[np.nan, 1, 3]]], np.float32)
    assert to_bytes(image).tolist() == [[[0, 255, 76]], [[0, 0, 0]], [[0, 0, 255]]]


# --- files of a download --------------------------------------------------------------------------------------------


def member(path, size=1):
    return Member(path, size, None)


def test_an_earlier_pattern_wins_and_a_later_one_fills_gaps():
    members = [member("r/b/1.tif", 5), member("r/a/1.tif", 7), member("r/b/2.tif"), member("r/b/2.tif.xml")]
    found = find(members, r"a/(\d)\.tif", r"(\d)\.tif")
    assert {key: m.path for key, m in found.items()} == {("1",): "r/a/1.tif", ("2",): "r/b/2.tif"}
    with pytest.raises(DataError, match="of one name and of different size; give --root only one"):
        find(members, r"(\d)\.tif")


def test_a_seeded_split_has_the_published_shares_and_depends_on_names_and_seed_only():
    names = [f"image{k}" for k in range(284)]
    draw = lambda names, seed: casid._draw(names, seed, "SubMs", (196, 88))  # noqa: E731
    split = draw(names, 0)
    assert sorted(split.values()).count("train") == 196
    assert split == draw(names[::-1], 0) != draw(names, 1)
