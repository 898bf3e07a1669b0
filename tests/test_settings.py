"""The shipped settings of the benchmark: that they parse, and that they are the published ones."""

from __future__ import annotations

import re
import statistics

import pytest

from cegate.configfile import find_config, read_config, shipped_configs
from cegate.data.published.catalogue import CATALOGUE
from cegate.engine.schedule import learning_rate
from cegate.errors import ConfigError
from cegate.matrix import published, published_mfnet
from cegate.methods import METHODS, OF_TWO_RASTERS

# images or crops of each split, as published
COUNTS = {
    **{f"/{root} {band}/train": 3456 for root in ("potsdam", "potsdam_rescue") for band in ("RGB", "IRRG")},
    **{f"/potsdam {band}/val": 2016 for band in ("RGB", "IRRG")},
    **{"/vaihingen train": 344, "/vaihingen val": 398, "/rescuenet test": 449},
    **{"/loveda Train/Urban": 1156, "/loveda Train/Rural": 1366, "/loveda Val/Urban": 677, "/loveda Val/Rural": 992},
    **{"/loveda_512 Train/Urban": 4624, "/loveda_512 Train/Rural": 5464},
    **{"/loveda_512 Val/Urban": 2708, "/loveda_512 Val/Rural": 3968},
    **{"/whu aerial/train": 4736, "/whu aerial/val": 1036, "/whu satellite/train": 13662, "/whu satellite/test": 3726},
    **{"/deepglobe train": 6226, "/massachusetts test": 49},
    **{"/casid SubMs/train": 4900, "/casid TemMs/train": 5025, "/casid TroMs/train": 3400, "/casid TroRf/train": 3700},
    **{"/casid SubMs/test": 2200, "/casid TemMs/test": 2075, "/casid TroMs/test": 1650, "/casid TroRf/test": 1550},
}

GIVEN = [(f"data.roots.{root}", f"/{root}") for root in sorted({key[1:].partition(" ")[0] for key in COUNTS})]

# name: gap, training images, test images, crop
DG = {
    "p_i2v": ("region", 3456, 398, 512),
    "v2p_i": ("region", 344, 2016, 512),
    "u2r": ("region", 1156, 992, 1024),
    "r2u": ("region", 1366, 677, 1024),
    "d2m": ("region", 6226, 49, 1024),
    "p_r2res": ("region, disaster", 3456, 449, 512),
    "p_r2p_i": ("band", 3456, 2016, 512),
    "p_i2p_r": ("band", 3456, 2016, 512),
    "p_r2v": ("region, band", 3456, 398, 512),
    "v2p_r": ("region, band", 344, 2016, 512),
    "p_i2res": ("region, band", 3456, 449, 512),
    "a2s": ("region, platform", 4736, 3726, 512),
    "s2a": ("region, platform", 13662, 1036, 512),
}
CASID = {"sub": (4900, 2200), "tem": (5025, 2075), "tms": (3400, 1650), "trf": (3700, 1550)}
DG |= {
    f"casid_{a}2{b}": ("region, climate", CASID[a][0], CASID[b][1], 1024) for a in CASID for b in CASID if a != b
} | {f"casid_{a}": ("none", *CASID[a], 1024) for a in CASID}

# name: source, unlabelled, test
DA = {"p2v": (3456, 344, 398), "v2p": (344, 3456, 2016), "r2u": (5464, 4624, 2708), "u2r": (4624, 5464, 3968)}

GATE_PAPER = [f"dg/casid_{a}2{b}" for a in CASID for b in CASID if a != b]
GATE_PAPER += ["dg/p_r2res", "dg/p_i2res", "da/p2v", "da/v2p", "da/r2u", "da/u2r"]


def count_of(item) -> int:
    return COUNTS[f"{item.root} {item.split}"]


def first_line(name: str) -> str:
    return find_config(name).read_text().splitlines()[0]


def test_exactly_the_published_settings_ship():
    names = {f"dg/{name}" for name in DG} | {f"da/{name}" for name in DA}
    assert len(DG) == 29 and len(DA) == 4
    assert {name for name in shipped_configs() if name.startswith(("dg/", "da/"))} == names
    assert len(GATE_PAPER) == 18 and set(GATE_PAPER) <= names


@pytest.mark.parametrize("name", DG)
def test_a_dg_setting_is_that_of_the_table(name):
    gap, train, test, crop = DG[name]
    config = read_config(f"dg/{name}", GIVEN, training=True)
    (target,) = config.data.targets.values()
    assert (count_of(config.data.source), count_of(target)) == (train, test)
    assert first_line(f"dg/{name}").endswith(f". Gap: {gap}. Train {train}, test {test}.")
    assert (config.data.crop, config.data.stride) == (crop, round(crop * 2 / 3))
    assert (config.data.batch_size, config.gate.interval, config.train.iterations) == (4, 100, 40000)
    assert config.adapt.method == "none" and config.data.unlabelled is None


# CrossEarth's Table 14: tau_s, b_s, tau_m, b_m; losses by its sections 5.1 and B.1
MASKS = {
    (0.7, 64, 0.7, 64): "p_i2v p_i2p_r",
    (0.3, 16, 0.7, 64): "p_r2v p_r2p_i p_r2res",
    (0.5, 32, 0.7, 64): "v2p_i v2p_r p_i2res",
    (0.1, 64, 0.7, 64): "u2r casid_sub casid_sub2tem casid_sub2tms casid_sub2trf "
    "casid_tms casid_tms2sub casid_tms2tem casid_tms2trf",
    (0.5, 16, 0.7, 64): "r2u a2s",
    (0.3, 16, 0.5, 16): "d2m",
    (0.5, 16, 0.7, 16): "s2a",
    (0.1, 64, 0.7, 128): "casid_tem casid_tem2sub casid_tem2tms casid_tem2trf",
    (0.5, 64, 0.7, 64): "casid_trf casid_trf2sub casid_trf2tem casid_trf2tms",
}


@pytest.mark.parametrize("masks", MASKS)
def test_a_dg_setting_has_crossearth_s_masks(masks):
    assert sorted(name for names in MASKS.values() for name in names.split()) == sorted(DG)
    for name in MASKS[masks].split():
        config = read_config(f"dg/{name}", [*GIVEN, ("run.method", "crossearth_gate")], training=True)
        style, mim = config.style, config.mim
        assert (style.ratio, style.block, mim.ratio, mim.block) == masks
        assert mim.loss == ("l1" if name.startswith("casid") else "mse")
        assert (style.method, style.alpha, style.probability, mim.method) == ("earth", 0.1, 0.1, "restore")


def test_crossearth_s_schedule_decays_beyond_its_end():
    schedule = [("train.iterations", "30000"), ("train.horizon", "40000"), ("data.batch_size", "1")]
    config = read_config("dg/p_i2v", [*GIVEN, ("run.method", "crossearth"), *schedule], training=True)
    assert learning_rate(config.train, 29999) == pytest.approx(1e-4 * (1 - 29999 / 40000) ** 0.9)


@pytest.mark.parametrize("name", DA)
def test_a_da_setting_is_that_of_the_table(name):
    train, unlabelled, test = DA[name]
    data = (config := read_config(f"da/{name}", GIVEN, training=True)).data
    (target,) = data.targets.values()
    assert (count_of(data.source), count_of(data.unlabelled), count_of(target)) == (train, unlabelled, test)
    assert first_line(f"da/{name}").endswith(f"Train {train} with labels and {unlabelled} without, test {test}.")
    assert data.unlabelled.root == target.root and data.unlabelled.split != target.split
    assert (data.crop, data.batch_size, config.gate.interval, config.train.iterations) == (512, 2, 50, 20000)
    assert (config.adapt.method, config.adapt.warmup, config.adapt.ema, config.adapt.weight) == (
        "dacs",
        4000,
        0.99,
        0.5,
    )


@pytest.mark.parametrize("name", [f"dg/{name}" for name in DG] + [f"da/{name}" for name in DA])
def test_every_setting_has_the_paper_s_recipe_and_a_folder_of_its_own(name):
    config = read_config(name, GIVEN, training=True)
    assert config.run.name == name.replace("/", "_") and config.run.method == "gate"
    model = config.model
    assert (model.backbone, model.patch_size, model.head) == ("vit_large_patch14_dinov2", 16, "mask2former")
    assert model.resample == "plain"
    assert model.features == [7, 11, 15, 23]
    train = config.train
    assert (train.lr, train.weight_decay, train.schedule, train.power) == (1e-4, 0.05, "poly", 0.9)
    assert (config.gate.k, train.eval_every) == (18, 2000)
    assert config.data.validation is None  # no choice by target labels


@pytest.mark.parametrize("name", [f"dg/{name}" for name in DG] + [f"da/{name}" for name in DA])
def test_a_missing_root_is_named_in_one_line(name):
    wanted = set(re.findall(r"\$\{(\w+)\}", find_config(name).read_text()))
    for missing in sorted(wanted):
        given = [(key, folder) for key, folder in GIVEN if key != f"data.roots.{missing}"]
        with pytest.raises(ConfigError) as error:
            read_config(name, given, training=True)
        assert f"give --data.roots.{missing} the folder" in str(error.value) and "\n" not in str(error.value)
        assert not any(f"data.roots.{other} " in str(error.value) for other in wanted - {missing})


def test_splits_and_classes_are_those_of_the_prepared_sets():
    names = {"potsdam": "isprs-potsdam", "potsdam_rescue": "potsdam-rescue", "vaihingen": "isprs-vaihingen"}
    names |= {"loveda_512": "loveda"}
    for name in [f"dg/{name}" for name in DG] + [f"da/{name}" for name in DA]:
        data = read_config(name, GIVEN, training=True).data
        classes = set()
        for item in (data.source, *data.targets.values(), *([data.unlabelled] if data.unlabelled else [])):
            root = item.root.removeprefix("/")
            published = CATALOGUE[names.get(root, root)]
            classes.add(published.classes)
            counts = published.splits[item.split]
            released = 450 if root == "rescuenet" else count_of(item)  # the papers print 449
            assert (counts.images if item.kind == "loveda" else counts.files) == released
        (common,) = classes
        assert len(common) > 2 or common[0] == "background"


def test_every_method_of_one_raster_fits_a_dg_and_a_da_setting():
    for method in METHODS.keys() - set(OF_TWO_RASTERS):
        for name in ("dg/p_i2v", "da/r2u"):
            assert read_config(name, [*GIVEN, ("run.method", method)], training=True).run.method == method


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dg/casid_sub2tm", "did you mean 'dg/casid_sub2tms'"),
        ("u2r", "did you mean 'da/u2r' or 'dg/u2r'?"),
        ("da/p_i2v", "did you mean 'dg/p_i2v'?"),
        ("nothing like it", "no shipped configuration; cegate bench --help lists all of them"),
    ],
)
def test_an_unknown_setting_names_the_nearest(given, message):
    with pytest.raises(ConfigError) as error:
        find_config(given)
    assert message in str(error.value) and len(str(error.value)) < 220


def test_recipes_are_no_settings():
    assert not [name for name in shipped_configs() if "_recipes" in name]


# --- the paper's numbers --------------------------------------------------------------------------------------------


def test_published_numbers_are_of_shipped_settings_and_known_methods():
    shipped = shipped_configs()
    assert set(published.SETTINGS) <= set(shipped)
    for group in published.GROUPS:
        assert set(group.settings) <= set(GATE_PAPER) and set(group.miou) <= set(METHODS)
    assert {len(group.settings) for group in published.GROUPS} == {2, 3, 4, 12}


def test_published_averages_are_those_of_the_published_settings():
    for group in published.GROUPS:
        for method, average in group.miou.items():
            single = [published.SETTINGS.get(name, {}).get(method) for name in group.settings]
            if None not in single:
                assert sum(single) / len(single) == pytest.approx(average, abs=0.11), (group.name, method)
    sources = {group.name: group.miou["gate"] for group in published.GROUPS if group.name.startswith("CASID")}
    whole = sources.pop("CASID, four sources")
    assert sum(sources.values()) / 4 == pytest.approx(whole, abs=0.06)


# IoU of each class as CrossEarth prints it beside the mean
PER_CLASS = """
p_i2v 83.6 91.7 63.8 70.2 59.5 36.3 | v2p_i 77.1 80.8 61.3 38.9 82.9 8.4 | p_r2p_i 86.1 91.5 73.8 79.7 91.9 43.8
p_i2p_r 86.3 93.5 73.8 74.0 91.2 37.2 | p_r2v 78.1 89.3 55.2 72.5 61.9 14.5 | v2p_r 72.5 73.6 58.7 22.4 81.1 7.6
p_r2res 43.6 59.7 51.0 16.4 63.2 | p_i2res 41.9 60.6 51.3 10.6 62.9
r2u 39.8 63.3 57.3 75.9 51.8 55.0 62.5 | u2r 57.5 61.5 48.5 65.6 9.6 25.4 58.2
casid_sub 63.3 82.2 84.7 44.9 71.7 | casid_sub2tem 47.1 70.0 50.3 43.9 28.6 | casid_sub2tms 71.9 68.4 80.2 38.8 63.5
casid_sub2trf 32.4 75.8 95.0 42.0 76.0 | casid_tem 56.7 69.9 74.7 39.4 26.5 | casid_tem2sub 57.1 77.8 84.3 33.6 64.4
casid_tem2tms 75.3 59.9 86.0 26.0 61.7 | casid_tem2trf 21.1 67.8 92.0 35.0 72.9 | casid_tms 71.2 69.9 81.7 43.6 78.1
casid_tms2sub 63.2 82.5 83.9 48.3 67.6 | casid_tms2tem 41.7 73.7 35.0 46.4 5.7 | casid_tms2trf 21.7 77.5 89.4 45.5 69.4
casid_trf 31.8 76.3 95.3 44.0 79.0 | casid_trf2sub 60.7 81.5 83.0 44.6 70.0 | casid_trf2tem 43.8 70.0 41.1 41.6 15.1
casid_trf2tms 68.1 68.2 79.0 34.3 72.5
"""


def test_crossearth_s_means_are_those_of_its_classes():
    rows = [row.split() for line in PER_CLASS.strip().splitlines() for row in line.split("|")]
    assert sorted([row[0] for row in rows] + ["a2s", "s2a", "d2m"]) == sorted(DG)  # these print the foreground alone
    for name, *values in rows:
        mean = sum(map(float, values)) / len(values)
        assert published.SETTINGS[f"dg/{name}"]["crossearth"] == pytest.approx(mean, abs=0.15), name
    gains = [row["crossearth"] - row["rein"] for name, row in published.SETTINGS.items() if name.startswith("dg/")]
    assert len(gains) == 29 and statistics.median(gains) == pytest.approx(1.5) and max(gains) == pytest.approx(13.5)
    assert sum(gain < 0 for gain in gains) == 4


def test_mfnets_numbers_are_of_shipped_settings_and_stand_beside_any_backbone():
    assert set(published_mfnet.SETTINGS) <= set(shipped_configs())
    title, numbers = published_mfnet.column("mfnet/vaihingen", "samvit_base_patch16")
    assert title == "paper, SAM ViT-B" and numbers == {"mfnet_lora": 82.09, "mfnet_adapter": 83.24}
    title, numbers = published_mfnet.column("mfnet/vaihingen", "tiny")
    assert title == "paper, SAM ViT-L" and numbers["mfnet_adapter_single"] == 83.69
    assert set(numbers) <= set(METHODS) and "mfnet_lora" not in published_mfnet.column("mfnet/mmhunan", "tiny")[1]
    assert title.startswith(published_mfnet.LABEL) and published_mfnet.LABEL in published_mfnet.NOTE
