from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch

import cegate
from cegate.config import (
    Config,
    DataConfig,
    FrequencyConfig,
    GateConfig,
    ModelConfig,
    RunConfig,
    SemanticConfig,
    SetConfig,
    SpatialConfig,
    ToolboxConfig,
)
from cegate.errors import BackboneError, ConfigError, DataError

CONFIG = Config(
    data=DataConfig(classes=["background", "building", "road"], crop=64),
    model=ModelConfig(weights="none"),
    toolbox=ToolboxConfig(
        spatial=SpatialConfig(rank=4), semantic=SemanticConfig(width=4), frequency=FrequencyConfig(width=4)
    ),
    gate=GateConfig(method="all"),
)


@pytest.fixture(scope="module")
def model():
    return cegate.build(CONFIG)


def test_equal_seeds_build_equal_models_and_leave_the_random_state(model):
    state = torch.get_rng_state()
    twin = cegate.build(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_head_and_toolbox_start_alike_whatever_the_gate_and_the_weights(model):
    twin = cegate.build(replace(CONFIG, gate=GateConfig(method="none")))
    assert all(torch.equal(a, b) for a, b in zip(model.head.parameters(), twin.head.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.toolbox.parameters(), twin.toolbox.parameters(), strict=True))


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (37, 51)], ids=str)
def test_logits_have_the_size_of_the_image(model, size):
    assert model(torch.randn(2, 3, *size)).shape == (2, 3, *size)


def test_each_sample_has_its_own_loss(model):
    images, labels = torch.randn(3, 3, 60, 64), torch.randint(0, 3, (3, 60, 64))
    losses = model.loss(images, labels)
    alone = torch.cat([model.loss(images[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(losses, alone)


def test_ignored_pixels_do_not_count(model):
    images, labels = torch.randn(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))
    other = labels.clone()
    labels[:, 20:], other[:, 20:] = 255, 255
    other[:, 40:] = 255
    assert torch.equal(model.loss(images, labels), model.loss(images, other))
    assert model.nll(images, labels).item() == pytest.approx(model.loss(images, labels).item(), rel=1e-5)


def test_only_toolbox_and_head_learn_and_the_backbone_stays_in_evaluation_mode(model):
    model.train()
    assert not model.vit.training
    assert model.head.training
    learn = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert learn == {"toolbox", "head"}


def test_predictions_of_an_array_do_not_depend_on_its_layout(model):
    image = np.random.default_rng(0).integers(0, 256, (3, 70, 90), dtype=np.uint8)
    classes = model.predict(image)
    assert classes.shape == (70, 90)
    assert classes.dtype == np.uint8
    assert np.array_equal(model.predict(np.moveaxis(image, 0, -1)), classes)
    proba = model.predict_proba(image)
    assert proba.dtype == np.float32
    np.testing.assert_allclose(proba.sum(0), 1, rtol=1e-5)
    assert np.array_equal(proba.argmax(0), classes)


def test_predicting_from_a_file_equals_predicting_from_its_pixels(model, tmp_path):
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    assert np.array_equal(model.predict(tmp_path / "image.png"), model.predict(image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 64, 64), np.uint8), r"\(5, 64, 64\).*\(3, H, W\)"),
        (np.zeros((3, 64, 64), np.uint16), "uint16.*8-bit"),
    ],
    ids=["bands", "depth"],
)
def test_unsuitable_images_are_refused(model, image, message):
    with pytest.raises(DataError, match=message):
        model.predict(image)


def test_sixteen_bit_pixels_are_scaled_by_the_training_range(model):
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    expected = model.predict_proba(image)
    model.recipe = dataclasses.replace(model.recipe, value_range=[[0, 25500]] * 3)
    try:
        np.testing.assert_allclose(model.predict_proba(image.astype(np.uint16) * 100), expected, atol=1e-6)
    finally:
        model.recipe = dataclasses.replace(model.recipe, value_range=None)


def test_eight_bit_pixels_are_refused_where_the_range_is_wider(model):
    model.recipe = dataclasses.replace(model.recipe, value_range=[[200, 4000]] * 3)
    try:
        with pytest.raises(DataError, match=r"image: pixels are uint8, but the model learns from .* up to 4000; give"):
            model.predict(np.zeros((3, 64, 64), np.uint8))
    finally:
        model.recipe = dataclasses.replace(model.recipe, value_range=None)


def test_a_scene_on_disk_is_segmented_as_it_is_in_memory(model, tmp_path):
    scene = np.random.default_rng(0).uniform(300, 900, (3, 900, 70)).astype(np.float32)
    scene[1, 60:70, 5] = scene[0, 895, 69] = np.nan
    with rasterio.open(tmp_path / "scene.tif", "w", "GTiff", 70, 900, 3, dtype="float32", blockysize=7) as out:
        out.write(scene)
    model.recipe = dataclasses.replace(model.recipe, value_range=[[300, 900]] * 3)
    shares = []
    try:
        classes = model.predict(tmp_path / "scene.tif", progress=shares.append)
        np.testing.assert_array_equal(classes, model.predict(scene))
        np.testing.assert_array_equal(model.predict_proba(tmp_path / "scene.tif"), model.predict_proba(scene))
    finally:
        model.recipe = dataclasses.replace(model.recipe, value_range=None)
    assert (classes == 255).sum() == 11
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 1


def test_pixels_without_a_value_are_left_out(model):
    image = np.random.default_rng(0).uniform(300, 900, (3, 50, 64)).astype(np.float32)
    model.recipe = dataclasses.replace(model.recipe, value_range=[[300, 900]] * 3)
    try:
        whole, filled = model.predict(image), image.copy()
        image[1, :10, :20], image[0, 40, 63], filled[:, :10, :20], filled[:, 40, 63] = np.nan, -np.inf, 0, 0
        empty = ~np.isfinite(image).all(0)
        shares, classes = model.predict_proba(image), model.predict(image)
        assert (classes[empty] == 255).all() and (classes[~empty] < 3).all() and whole.max() < 3
        assert np.isnan(shares[:, empty]).all()
        np.testing.assert_array_equal(shares[:, ~empty], model.predict_proba(filled)[:, ~empty])
        with pytest.raises(DataError, match="image has 201 NaN or infinite pixels; fill them, or call predict"):
            model.normalise(image)
    finally:
        model.recipe = dataclasses.replace(model.recipe, value_range=None)


def test_where_an_image_has_no_data_nothing_is_predicted(model, tmp_path):
    scene = np.random.default_rng(0).integers(1, 256, (3, 300, 70), dtype=np.uint8)
    scene[:, 40:200, 10:30], scene[0, 0, 0] = 0, 0
    empty = (scene == 0).all(0)
    with rasterio.open(tmp_path / "scene.tif", "w", "GTiff", 70, 300, 3, dtype="uint8", nodata=0) as out:
        out.write(scene)
    with rasterio.open(tmp_path / "scene.tif") as file:
        images = [tmp_path / "scene.tif", file.read(masked=True), np.moveaxis(file.read(masked=True), 0, -1)]
    whole, shares = model.predict(scene), model.predict_proba(scene)
    assert whole.max() < 3
    for image in images:
        np.testing.assert_array_equal(model.predict(image), np.where(empty, 255, whole))
        np.testing.assert_array_equal(model.predict_proba(image), np.where(empty, np.nan, shares))
        np.testing.assert_array_equal(model.predict(image, all_pixels=True), whole)
        assert torch.equal(model.normalise(image), model.normalise(scene))


def test_a_constant_band_becomes_zero(model):
    model.recipe = dataclasses.replace(model.recipe, value_range=[[0, 1000], [7, 7], [0, 1000]])
    try:
        tensor = model.normalise(np.full((3, 64, 64), 7, np.uint16))
        assert torch.isfinite(tensor).all()
        assert tensor[1, 0, 0].item() == pytest.approx(-model.recipe.mean[1] / model.recipe.std[1])
    finally:
        model.recipe = dataclasses.replace(model.recipe, value_range=None)


def test_more_bands_widen_the_input():
    data = replace(CONFIG.data, source=SetConfig(bands=[4, 3, 2, 1]))
    model = cegate.build(replace(CONFIG, data=data))
    assert model(torch.randn(1, 4, 64, 64)).shape == (1, 3, 64, 64)
    assert len(model.recipe.mean) == len(model.recipe.std) == 4


def test_build_takes_a_dict_and_names_an_unknown_key():
    sections = {"model": {"weights": "none"}, "data": {"classes": ["a", "b"], "crop": 64}, "gate": {"method": "none"}}
    assert cegate.build(sections).toolbox.plan.on == ()
    with pytest.raises(ConfigError, match=r"wieghts.*did you mean .*weights"):
        cegate.build({**sections, "model": {"wieghts": "none"}})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": GateConfig(k=25)}, ConfigError, r"k=25.*24 sites"),
        ({"gate": GateConfig(method="fixed", sites=["spatial.8"])}, ConfigError, r"spatial\.8"),
        ({"gate": GateConfig(method="fixed")}, ConfigError, "gate.sites"),
        ({"data": replace(CONFIG.data, classes=["only"])}, ConfigError, "at least two classes"),
        ({"data": replace(CONFIG.data, palette=["#FFFFFF"])}, ConfigError, "1 colours for 3 classes"),
        (
            {"data": replace(CONFIG.data, crop=7)},
            BackboneError,
            r"7 px are less than a patch of 8",
        ),
        ({"data": replace(CONFIG.data, crop=60)}, BackboneError, r"data\.crop=60 is no multiple of .* 8; use 56 or 64"),
    ],
    ids=["k", "site", "no-sites", "classes", "palette", "little", "crop"],
)
def test_what_does_not_fit_is_named(change, error, message):
    with pytest.raises(error, match=message):
        cegate.build(replace(CONFIG, **change))


def test_prediction_computes_in_the_precision_of_the_run(model):
    image = np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8)
    twin = cegate.build(replace(CONFIG, run=RunConfig(precision="bf16")))
    for segmenter in (model, twin):
        torch.nn.init.normal_(segmenter.head.classifier.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = model(model.normalise(image)[None]).softmax(1)[0].numpy()
    np.testing.assert_array_equal(twin.predict_proba(image), narrow)
    assert (model.predict_proba(image) != narrow).any()
