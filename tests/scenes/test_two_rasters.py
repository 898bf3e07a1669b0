"""Prediction from two rasters: what is read is what was trained on, and what is missing is known to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

import cegate
from cegate import predict
from cegate.adapter_folder import save_adapter
from cegate.config import SecondConfig, SetConfig
from cegate.data.datasets import open_set
from cegate.data.stream import EvalStream
from cegate.errors import DataError
from cegate.scenes import mosaic
from cegate.scenes.files import pair_second, plan_outputs
from cegate.scenes.mosaic import Mosaic, Pixels
from cegate.scenes.reader import open_reader

SIZE = 40, 30


def build(**modal):
    torch.manual_seed(0)
    model = cegate.build(
        {
            "data": {"classes": ["a", "b", "c"], "crop": 16, "source": {"second": {"bands": [1]}}},
            "model": {"weights": "none", "head": "unetformer"},
            "modal": {"method": "mmlora", **modal},
            "gate": {"method": "none"},
        }
    )
    with torch.no_grad():
        for part in (model.streams, model.modal):
            for weight in part.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    """It learned to do without either raster."""
    return build(dropout=0.3)


@pytest.fixture
def scene(tmp_path):
    """Image and elevation that is coarser, of another extent, in metres and with a hole."""
    rng = np.random.default_rng(0)
    image, heights = rng.integers(0, 256, (3, *SIZE), np.uint8), rng.uniform(200, 230, (1, 24, 20)).astype(np.float32)
    heights[0, 8:12, 5:9] = -9999
    for name, pixels, size_m, tag in (("image", image, 0.5, None), ("dsm", heights, 1.0, -9999)):
        place = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, size_m, size_m), "nodata": tag}
        shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
        (tmp_path / name).mkdir()
        with rasterio.open(tmp_path / name / "1.tif", "w", driver="GTiff", dtype=pixels.dtype, **shape, **place) as out:
            out.write(pixels)
    return tmp_path / "image/1.tif", tmp_path / "dsm/1.tif"


def read(recipe, image, second, rows=7):
    with open_reader(image, recipe, second=second) as reader:
        strips = [reader.read(first, min(first + rows, SIZE[0])) for first in range(0, SIZE[0], rows)]
    empty = None if strips[0].empty is None else np.concatenate([strip.empty for strip in strips])
    return torch.cat([strip.pixels for strip in strips], 1), empty


@pytest.mark.parametrize("scale", ["tile", "scene", "fixed"])
def test_what_is_predicted_from_is_what_was_trained_on(model, scene, scale, tmp_path):
    second = SecondConfig(images="dsm/*", scale=scale, value_range=[190.0, 240.0] if scale == "fixed" else None)
    cfg = SetConfig(root=str(tmp_path), images="image/*", second=second)
    dataset = open_set(cfg, name="s", classes=["a", "b", "c"], labelled=False)
    recipe = cegate.build(
        {
            "data": {"classes": ["a", "b"], "source": {"second": {"scale": scale, "value_range": second.value_range}}},
            "model": {"weights": "none", "head": "unetformer"},
            "gate": {"method": "none"},
        }
    ).recipe
    expected = EvalStream(dataset, mean=recipe.mean, std=recipe.std).batch(0).image[0]
    found, _ = read(recipe, *scene)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert found[3].isnan().any() and found[3][~found[3].isnan()].min() >= 0
    heights = expected[3].numpy()  # as an array they are scaled already
    again, _ = read(recipe, scene[0], np.where(np.isnan(heights), np.nan, heights * 30 + 200))
    assert scale != "tile" or torch.allclose(again, found, atol=1e-5, equal_nan=True)


def test_both_one_or_the_other(model, scene):
    image, dsm = scene
    both, without, alone = model.predict(image, second=dsm), model.predict(image), model.predict(second=dsm)
    assert both.shape == without.shape == SIZE and alone.shape == (24, 20)
    assert (both != without).any() and (both != 255).all()
    hole = np.zeros((24, 20), bool)
    hole[8:12, 5:9] = True
    np.testing.assert_array_equal(alone == 255, hole)  # there nothing at all is known
    shares = model.predict_proba(image, second=dsm)
    np.testing.assert_array_equal(shares.argmax(0), both)
    pixels = model.normalise(image)
    assert pixels.shape == (4, *SIZE) and pixels[3].isnan().all() and not pixels[:3].isnan().any()
    missing = torch.cat([model.normalise(image, second=dsm)[:3], torch.full((1, *SIZE), torch.nan)])
    assert torch.equal(pixels[:3], missing[:3])


def test_a_missing_image_is_missing_beyond_a_small_raster_too(model):
    """As in a crop of training that lost it; an image that is there ends at its edge."""
    heights = np.random.default_rng(0).uniform(0, 9, (1, 10, 12)).astype(np.float32)
    crop = torch.full((1, 4, 16, 16), torch.nan)
    crop[0, 3, :10, :12] = torch.from_numpy((heights[0] - heights.min()) / np.ptp(heights))
    for image in (None, np.full((3, 10, 12), 90, np.uint8)):
        if image is not None:
            crop[:, :3] = 0
            crop[0, :3, :10, :12] = model.normalise(image)[:3]
        with torch.no_grad():
            expected = model(crop)[0, :, :10, :12].softmax(0).numpy()
        np.testing.assert_allclose(model.predict_proba(image, second=heights), expected, rtol=0, atol=1e-6)


def test_both_are_read_ahead_as_they_are_in_turn(model, scene, in_turn, monkeypatch):
    monkeypatch.setattr(mosaic, "PIXELS_ON_CPU", 2 * 16**2)  # so that there are several strips
    image, dsm = scene
    ways = [{"image": image, "second": dsm}, {"image": image}, {"second": dsm}]
    found = [model.predict_proba(**way, stride=9) for way in ways]
    with in_turn():
        for way, shares in zip(ways, found, strict=True):
            np.testing.assert_array_equal(model.predict_proba(**way, stride=9), shares)


def test_beyond_a_small_image_a_second_raster_is_unknown(model):
    seen = []
    image = torch.randn(4, 9, 11)
    list(Mosaic(16, further=1).rows(lambda windows: seen.append(windows) or windows[:, :2], Pixels(image)))
    (window,) = seen[0]
    assert torch.equal(window[:, :9, :11], image) and (window[:3, 9:] == 0).all() and (window[:3, :, 11:] == 0).all()
    assert window[3, 9:].isnan().all() and window[3, :, 11:].isnan().all()
    whole = model.whole_images(image[None])
    assert whole.shape[-2:] == (16, 16) and whole[0, 3, 9:].isnan().all() and (whole[0, :3, 9:] == 0).all()
    half = Mosaic(8, fit=8, further=1)
    image[3, :, :4] = torch.nan
    list(half.rows(lambda windows: seen.append(windows) or windows[:, :2], Pixels(image)))
    assert seen[-1][:, :3].isfinite().all() and seen[-1][0, 3, :, 0].isnan().all()
    assert seen[-1][0, 3, :6, 4:].isfinite().all()


def test_rasters_that_do_not_fit_are_refused_in_a_line(model, scene, write_scene, tmp_path):
    image, dsm = scene
    both = build()
    far = {"crs": "EPSG:32633", "transform": from_origin(600000, 5000000, 1, 1)}
    with rasterio.open(
        tmp_path / "far.tif", "w", driver="GTiff", dtype="float32", count=1, height=9, width=9, **far
    ) as f:
        f.write(np.ones((1, 9, 9), np.float32))
    write_scene("empty.tif", np.full((1, *SIZE), -9999, np.float32), nodata=-9999)
    flat = cegate.build({"data": {"classes": ["a", "b"], "crop": 16}, "model": {"weights": "none"}})
    two_bands = build()
    two_bands.recipe = cegate.recipe.Recipe.from_mapping(
        two_bands.recipe.to_mapping() | {"second": {"name": "sar", "bands": [1, 2]}}
    )
    for who, given, message in (
        (
            both,
            {"image": image},
            r"never learned to do without the second raster \(dsm\); give it, or train with modal",
        ),
        (both, {"second": dsm}, "never learned to do without the image"),
        (model, {}, "neither an image nor a second raster"),
        (flat, {"image": image, "second": dsm}, "learned from images alone, it has no use for a second raster"),
        (both, {"image": image, "second": tmp_path / "far.tif"}, r"far\.tif does not overlap the image"),
        (both, {"image": image, "second": tmp_path / "none.tif"}, r"none\.tif"),
        (
            both,
            {"image": image, "second": tmp_path / "empty.tif"},
            r"empty\.tif: no pixel of the second raster is known",
        ),
        (two_bands, {"image": image, "second": dsm}, r"1\.tif has 1 band, of which \[1, 2\] are to be read"),
        (both, {"image": image, "second": np.zeros((9, 9))}, "has 9x9 pixels, the image 30x40"),
        (both, {"image": image, "second": np.full(SIZE, np.nan)}, "no pixel of the second raster is known"),
    ):
        with pytest.raises(DataError, match=message) as error:
            who.predict(**given)
        assert "\n" not in str(error.value)
    np.testing.assert_array_equal(model.predict(image, second=tmp_path / "empty.tif"), model.predict(image))


def test_further_bands_are_refused_where_training_chose_none(model, scene, write_scene):
    image, dsm = scene
    heights = np.random.default_rng(1).uniform(200, 230, (3, *SIZE)).astype(np.float32)
    three, first = write_scene("three.tif", heights), write_scene("first.tif", heights[:1])
    np.testing.assert_array_equal(model.predict(image, second=three), model.predict(image, second=first))
    strict = build(dropout=0.3)
    strict.recipe = replace(strict.recipe, second=replace(strict.recipe.second, surplus="error"))
    with pytest.raises(
        DataError, match=r"three\.tif has 3 bands, the second raster \(dsm\) that was learned from 1; gi"
    ):
        strict.predict(image, second=three)
    strict.predict(image, second=dsm)


@pytest.mark.parametrize(
    ("images", "seconds", "pairs"),
    [
        (["a/1.tif", "a/2.tif"], ["b/2.tif", "b/1.tif"], [1, 0]),
        (["a/x_1_img.png", "a/x_2_img.png"], ["b/x_1_dsm.png", "b/x_2_dsm.png", "b/x_3_dsm.png"], [0, 1]),
        (["a/1.tif", "a/2.tif"], ["b/dsm_1.tif", "b/dsm_2.tif"], [0, 1]),
        (["a/1.tif", "a/2.tif"], ["all.tif"], [0, 0]),
        (["a/x10.tif", "a/x11.tif"], ["b/y10.tif", "b/y11.tif"], None),
        (["a/1.tif", "a/3.tif"], ["b/1.tif", "b/2.tif"], None),
    ],
)
def test_files_are_paired_by_name(images, seconds, pairs, tmp_path):
    images, seconds = ([tmp_path / name for name in names] for names in (images, seconds))
    if pairs is None:
        with pytest.raises(DataError, match="has no second raster of its name among the 2 of --second"):
            pair_second(images, seconds)
    else:
        assert pair_second(images, seconds) == dict(zip(images, [seconds[k] for k in pairs], strict=True))


def test_a_raster_that_is_read_is_no_output_and_no_second_of_itself(model, scene, tmp_path):
    image, second = tmp_path / "a.png", tmp_path / "dsm.tif"
    for file in (image, second):
        file.write_bytes(b"x")
    with pytest.raises(DataError, match=r"the mask of .*a\.png would replace .*dsm\.tif, which is read"):
        plan_outputs([image], second, overwrite=True, seconds=[second])
    image, _ = scene
    (tmp_path / "link.tif").symlink_to(image)
    for itself in (image, tmp_path / "link.tif"):
        with pytest.raises(
            DataError, match=r"would be its own second raster \(band 1 is read for both\); give --second"
        ):
            model.predict(image, second=itself)


def test_the_command_takes_two_inputs_or_one(model, scene, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", model, "", {})
    image, dsm = map(str, scene)
    config = tmp_path / "adapter/adapter_config.json"
    hashed = cegate.backbone.vit.weight_hash(model.vit)
    config.write_text(config.read_text().replace('"backbone_sha256": ""', f'"backbone_sha256": "{hashed}"'))
    common = ["--adapter", str(tmp_path / "adapter"), "--blend", "cosine", "--device", "cpu"]
    for name, given, expected in (
        ("both", ["--input", image, "--second", dsm], model.predict(image, second=dsm)),
        ("image", ["--input", image], model.predict(image)),
        ("dsm", ["--second", dsm], model.predict(second=dsm)),
    ):
        out = tmp_path / f"{name}.tif"
        assert predict.main([*common, *given, "--output", str(out)]) == 0, capsys.readouterr().err
        with rasterio.open(out) as written, rasterio.open(image if name != "dsm" else dsm) as like:
            np.testing.assert_array_equal(written.read(1), expected)
            assert written.transform == like.transform


def test_an_image_that_its_second_raster_covers_in_part_is_named_with_the_share(model, scene, tmp_path, capsys, caplog):
    save_adapter(tmp_path / "adapter", model, "0" * 64, {})
    image, _ = scene
    place = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 0.5, 0.5)}
    heights = np.random.default_rng(1).uniform(200, 230, (1, SIZE[0], SIZE[1] // 2)).astype(np.float32)
    shape = dict(zip(("count", "height", "width"), heights.shape, strict=True))
    for name, columns in (("half", SIZE[1] // 2), ("all", SIZE[1])):
        pixels = np.repeat(heights, columns // (SIZE[1] // 2), axis=2)
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", dtype="float32", **shape | {"width": columns}, **place
        ) as out:
            out.write(pixels)
    model.predict(image, second=tmp_path / "all.tif")
    model.predict(image)
    assert caplog.records == []
    model.predict(image, second=tmp_path / "half.tif")
    assert "1.tif: the second raster is unknown in 50.0 % of it" in caplog.text
    with open_reader(image, model.recipe, second=tmp_path / "half.tif") as reader:
        for first in range(0, SIZE[0], 16):
            reader.read(first, min(first + 16, SIZE[0]))
    assert reader.lacking == 0.5
