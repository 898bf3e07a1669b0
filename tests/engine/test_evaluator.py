from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

import cegate
from cegate.data.datasets import open_set
from cegate.engine.evaluator import (
    Tally,
    evaluate,
    evaluate_run,
    percent,
    predict_logits,
    predictor_of,
    table_of,
    windows_of,
    write_evaluation,
)
from cegate.engine.trainer import train
from cegate.errors import CheckpointError, ConfigError
from cegate.runfolder import RunFolder
from cegate.scenes.mosaic import Mosaic, Pixels
from cegate.segmenter import Segmenter


@pytest.fixture
def segmenter(small):
    model = cegate.build(small())
    with torch.no_grad():
        model.head.load_state_dict({k: 5 * torch.randn_like(v) for k, v in model.head.state_dict().items()})
    return model


@pytest.fixture
def arid(small):
    config = small().data
    return open_set(config.targets["arid"], name="arid", classes=config.classes)


def test_result_is_the_same_for_any_number_of_windows_at_once(segmenter, arid):
    matrices = [evaluate(segmenter, arid, crop=32, stride=8, batch=batch).confusion.matrix for batch in (1, 2, 3, 64)]
    assert all(torch.equal(matrices[0], matrix) for matrix in matrices[1:])
    assert matrices[0].sum() == 40 * 40


def test_the_loss_is_the_mean_over_valid_pixels_of_the_whole_image(segmenter, arid):
    item = arid.read(0)
    logits = predict_logits(segmenter, torch.from_numpy(item.image[None]), crop=32).double()
    label = torch.from_numpy(item.label.astype(np.int64))
    label[:11, 5:] = 255
    shares = logits.softmax(1)[0].gather(0, label.where(label < 5, 0)[None])[0]
    expected = -shares.log()[label != 255].mean().item()
    tally = Tally(segmenter.classes, label)
    for rows in predictor_of(segmenter, crop=32).rows(Pixels(torch.from_numpy(item.image))):
        tally.add(rows)
    assert tally.loss == pytest.approx(expected, rel=1e-5)
    assert tally.confusion.matrix.sum() == (label != 255).sum()
    assert Tally(segmenter.classes, label).loss == 0


def test_evaluation_leaves_mode_and_random_state(segmenter, arid):
    segmenter.train()
    state = torch.get_rng_state()
    evaluate(segmenter, arid, crop=32)
    assert segmenter.training and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("blend", ["none", "cosine"])
def test_confusion_counts_what_predict_predicts(segmenter, arid, blend):
    item = arid.read(0)
    mask = segmenter.predict((item.image * 255).round().astype(np.uint8), blend=blend)
    found = evaluate(segmenter, arid, crop=32, blend=blend).confusion.matrix.numpy()
    expected = np.zeros_like(found)
    np.add.at(expected, (item.label.ravel(), mask.ravel()), 1)
    assert np.array_equal(found, expected)


def test_written_files_agree(segmenter, arid, tmp_path):
    evaluation = evaluate(segmenter, arid, crop=32)
    write_evaluation(tmp_path / "arid", evaluation, iteration=3)
    saved = json.loads((tmp_path / "arid/metrics.json").read_text())
    rows = list(csv.DictReader((tmp_path / "arid/per_class.csv").open()))
    assert saved["iteration"] == 3 and saved["images"] == 1
    assert [row["class"] for row in rows] == list(segmenter.classes)
    for row in rows:
        value = saved["per_class"][row["class"]]["IoU"]
        assert row["IoU"] == ("" if value is None else f"{value:.6f}")
    assert np.load(tmp_path / "arid/confusion.npy").dtype == np.int64


def test_a_shrunk_image_is_counted_at_full_size(segmenter, small, monkeypatch):
    config = small(data__targets__arid__fit="20").data
    shrunk = open_set(config.targets["arid"], name="arid", classes=config.classes)
    seen = []
    monkeypatch.setattr(
        segmenter, "forward", lambda x: seen.append(tuple(x.shape[-2:])) or Segmenter.forward(segmenter, x)
    )
    evaluation = evaluate(segmenter, shrunk, crop=32)
    assert seen == [(32, 32)]  # 40 px shrunk to 20, filled up to one window
    assert evaluation.confusion.matrix.sum() == 40 * 40
    item = shrunk.read(0)
    whole = predict_logits(segmenter, torch.from_numpy(item.image[None]), crop=32)
    small_one = predict_logits(segmenter, torch.from_numpy(item.image[None]), crop=32, fit=40)
    assert torch.equal(whole, small_one), "an image that fits stays as it is"


def test_tiles_add_up_to_the_domain(segmenter, arid, tmp_path):
    evaluation = evaluate(segmenter, arid, crop=32)
    write_evaluation(tmp_path, evaluation)
    tiles = np.load(tmp_path / "tiles.npz")
    assert list(tiles["names"]) == [arid.item_name(index) for index in range(len(arid))]
    assert (tiles["confusion"].sum(0) == np.load(tmp_path / "confusion.npy")).all()


def test_table_names_absent_classes(segmenter, arid):
    evaluation = evaluate(segmenter, arid, crop=32)
    evaluation.confusion.matrix[4] = 0
    evaluation.confusion.matrix[:, 4] = 0
    table = table_of([evaluation])
    assert any("without water" in cell for cell in table.columns[1]._cells)
    assert percent(float("nan")) == percent(None) == "–" and percent(0.1234) == "12.3"


def test_a_run_is_evaluated_as_it_was_in_training(small, no_figures, tmp_path):
    config = small()
    result = train(config)
    run = RunFolder(result.path)
    by_domain = {e.domain: e for e in evaluate_run(run, run.config(), output=tmp_path / "out")}
    for domain, record in result.after.items():
        assert by_domain[domain].scores.mIoU == record["mIoU"]
    assert (tmp_path / "out/arid/confusion.npy").is_file()
    with pytest.raises(CheckpointError, match="exists; give another --output"):
        evaluate_run(run, run.config(), output=tmp_path / "out")
    nothing = small(data__targets="{}", data__validation="null")
    with pytest.raises(ConfigError, match=r"nothing to evaluate on; give --data\.targets"):
        evaluate_run(run, nothing)
    other = small(data__classes="[background, building, forest, road, lake]")
    with pytest.raises((CheckpointError, ConfigError), match="lake"):
        evaluate_run(run, other)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*missing\.pt"):
        evaluate_run(run, run.config(), checkpoint="missing.pt")


@pytest.mark.usefixtures("little_mask2former")
def test_windows_of_mask2former_are_averaged_as_shares(small, arid):
    model = cegate.build(small(model__head="mask2former"))
    pixels = (arid.read(0).image * 255).round().astype(np.uint8)
    image = model.normalise(pixels)[None]
    with torch.no_grad():
        of_shares, of_logits = (
            torch.cat([rows.logits for rows in Mosaic(32, log_shares=on).rows(model.eval(), Pixels(image[0]))], 1)
            for on in (True, False)
        )
    assert not torch.allclose(of_shares, of_logits, atol=1e-4)
    torch.testing.assert_close(predict_logits(model, image, crop=32)[0], of_shares)
    np.testing.assert_allclose(model.predict_proba(pixels, blend="none"), of_shares.exp(), atol=1e-5)


def test_the_configuration_says_how_images_are_predicted(small):
    assert windows_of(small(data__stride=20)) == {"crop": 32, "stride": 20, "blend": "none", "tta": "none"}
    config = small(data__stride=20, evaluate__stride=12, evaluate__blend="cosine", evaluate__tta="flip")
    assert windows_of(config) == {"crop": 32, "stride": 12, "blend": "cosine", "tta": "flip"}
    segmenter = cegate.build(config)
    assert segmenter.recipe.stride == 12
    dataset = open_set(config.data.targets["arid"], name="arid", classes=config.data.classes)
    plain, asked = (evaluate(segmenter, dataset, **windows) for windows in ({"crop": 32}, windows_of(config)))
    assert asked.images == plain.images and asked.loss != plain.loss and np.isfinite(asked.loss)


def test_the_held_out_part_is_called_validation(segmenter, small):
    config = small().data
    held_out = open_set(config.validation, name="source", classes=config.classes)
    table = table_of([evaluate(segmenter, held_out, crop=32)])
    assert next(iter(table.columns[0].cells)) == "validation"
