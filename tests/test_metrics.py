from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cegate.metrics import Confusion, Scores

CLASSES = ("background", "building", "forest", "road")
MASK = arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3]))
LABEL = arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 255]))  # class 3 is never true


def confusion_of(prediction, label, classes=CLASSES) -> Confusion:
    confusion = Confusion(classes)
    confusion.update(prediction, label)
    return confusion


def share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def mean(values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def scores_by_counting(prediction: np.ndarray, label: np.ndarray) -> dict[str, object]:
    valid = label != 255
    iou, f1, accuracy = [], [], []
    for c in range(len(CLASSES)):
        predicted, true = (prediction == c) & valid, label == c
        both, either = int((predicted & true).sum()), int((predicted | true).sum())
        iou.append(share(both, either))
        f1.append(share(2 * both, both + either))
        accuracy.append(share(both, int(true.sum())))
    right = int((prediction[valid] == label[valid]).sum())
    means = {"aAcc": share(right, int(valid.sum())), "mIoU": mean(iou), "mAcc": mean(accuracy), "mF1": mean(f1)}
    return {"iou": iou, "f1": f1, "accuracy": accuracy, **means}


@settings(max_examples=40, deadline=None)
@given(MASK, LABEL)
def test_scores_agree_with_counting_pixels(prediction, label):
    scores = confusion_of(prediction, label).scores()
    for name, expected in scores_by_counting(prediction, label).items():
        np.testing.assert_allclose(getattr(scores, name), expected, rtol=1e-12, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(MASK, LABEL, MASK, LABEL)
def test_parts_add_up_to_the_whole(prediction_a, label_a, prediction_b, label_b):
    whole = confusion_of(np.stack([prediction_a, prediction_b]), np.stack([label_a, label_b]))
    one_by_one = confusion_of(prediction_a, label_a)
    one_by_one.update(prediction_b, label_b)
    summed = confusion_of(prediction_a, label_a) + confusion_of(prediction_b, label_b)
    assert torch.equal(whole.matrix, one_by_one.matrix)
    assert torch.equal(whole.matrix, summed.matrix)


def test_rows_are_truth_and_columns_are_prediction():
    matrix = confusion_of(np.array([1, 1, 2]), np.array([0, 0, 255])).matrix
    assert matrix.dtype == torch.int64
    assert matrix[0, 1] == 2
    assert matrix.sum() == 2


def test_counts_beyond_float_precision_stay_exact():
    start = torch.zeros(4, 4, dtype=torch.int64)
    start[0, 0] = 2**53
    confusion = Confusion(CLASSES, start)
    confusion.update(np.zeros(1, np.uint8), np.zeros(1, np.uint8))
    assert confusion.matrix[0, 0] == 2**53 + 1
    assert start[0, 0] == 2**53, "the given matrix belongs to the caller"


def test_class_absent_from_truth_and_prediction_is_left_out_of_means():
    scores = confusion_of(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])).scores()
    assert scores.absent == ("forest", "road")
    assert scores.mIoU == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert math.isnan(scores.iou[2])


def test_class_that_is_only_predicted_counts_as_wrong_but_has_no_accuracy():
    scores = confusion_of(np.array([3, 0]), np.array([0, 0])).scores()
    assert scores.absent == ("building", "forest")
    assert scores.iou[3] == scores.f1[3] == 0
    assert math.isnan(scores.accuracy[3])
    assert scores.mIoU == 0.25
    assert scores.mAcc == 0.5


def test_empty_confusion_is_nan_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion = confusion_of(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
        scores = confusion.scores()
        as_dict = scores.to_dict()
    assert all(map(math.isnan, [*scores.iou, scores.aAcc, scores.mIoU, scores.mAcc, scores.mF1]))
    assert scores.absent == CLASSES
    assert as_dict["mIoU"] is None


def test_binary_task_reports_the_foreground():
    scores = confusion_of(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]), classes=("background", "road")).scores()
    assert scores.foreground_iou == scores.iou[1] == pytest.approx(1 / 3)
    assert scores.to_dict()["foreground_IoU"] == pytest.approx(1 / 3)
    several = confusion_of(np.array([1]), np.array([1])).scores()
    assert several.foreground_iou is None
    assert "foreground_IoU" not in several.to_dict()


def test_dict_is_strict_json_and_says_what_is_absent():
    scores = confusion_of(np.array([0, 1]), np.array([0, 0])).scores()
    loaded = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert loaded["per_class"]["background"] == {"IoU": 0.5, "F1": pytest.approx(2 / 3), "accuracy": 0.5}
    assert loaded["per_class"]["road"] == {"IoU": None, "F1": None, "accuracy": None}
    assert loaded["absent"] == ["forest", "road"]
    assert loaded["aAcc"] == 0.5


def test_rows_follow_the_class_order():
    scores: Scores = confusion_of(np.array([0, 1]), np.array([0, 1])).scores()
    assert [row[0] for row in scores.rows()] == list(CLASSES)
    assert scores.rows()[1] == ("building", 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([4], [0], r"prediction holds class index 4; with 4 classes use 0\.\.3 or 255"),
        ([0], [7], "label holds class index 7"),
        ([0], [-1], "label holds class index -1"),
        ([0, 1], [0], r"prediction is \[2\] but label is \[1\]"),
    ],
)
def test_what_cannot_be_counted_is_refused_and_leaves_the_counts(prediction, label, message):
    confusion = Confusion(CLASSES)
    with pytest.raises(ValueError, match=message):
        confusion.update(np.array(prediction), np.array(label))
    assert confusion.matrix.sum() == 0


def test_prediction_under_ignored_pixels_may_be_anything():
    assert confusion_of(np.array([255, 9, 1]), np.array([255, 255, 1])).matrix.sum() == 1


def test_confusions_of_other_classes_do_not_add():
    with pytest.raises(ValueError, match="use the same classes"):
        Confusion(CLASSES) + Confusion(CLASSES[:3])


def test_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"4 classes is int64 \[4, 4\], not int64 \[3, 3\]"):
        Confusion(CLASSES, np.zeros((3, 3), np.int64))


def test_kappa_is_agreement_beyond_chance():
    matrix = torch.tensor([[20, 5], [10, 15]])
    assert Confusion(("a", "b"), matrix).scores().kappa == pytest.approx(0.4)  # 0.7 observed, 0.5 by chance
    assert Confusion(("a", "b"), torch.tensor([[5, 0], [0, 9]])).scores().kappa == 1
    assert Confusion(("a", "b"), torch.tensor([[5, 5], [5, 5]])).scores().kappa == 0


def test_means_can_leave_a_class_out_whose_pixels_still_count():
    matrix = torch.tensor([[8, 0, 2], [0, 6, 0], [1, 0, 3]])
    confusion = Confusion(("tree", "car", "clutter"), matrix)
    scores, every = confusion.scores(("tree", "car")), confusion.scores()
    assert scores.mIoU == pytest.approx((8 / 11 + 1) / 2)
    assert scores.mF1 == pytest.approx((16 / 19 + 1) / 2)
    assert scores.mAcc == pytest.approx((0.8 + 1) / 2)
    assert (scores.aAcc, scores.kappa, scores.iou) == (every.aAcc, every.kappa, every.iou)
    assert scores.to_dict()["mean_classes"] == ["tree", "car"]
    assert "mean_classes" not in every.to_dict()
    with pytest.raises(ValueError, match="mean_classes: 'house' is no class; classes are tree, car, clutter"):
        confusion.scores(("house",))
