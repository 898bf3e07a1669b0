"""Segmentation metrics: one confusion matrix per domain, and the scores that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cegate.config import IGNORE


@dataclass(frozen=True)
class Scores:
    """Scores of one domain, as shares 0..1; NaN where a score is undefined.

    A class is *absent* when no valid pixel has it, neither in truth nor in prediction: its scores are NaN. A class that
    is predicted but not in the truth has IoU and F1 of 0 and no accuracy (0 of 0 pixels). Means leave NaN out; without
    any pixel they are NaN too.
    """

    classes: tuple[str, ...]
    """Class names in the order of their indices."""
    iou: tuple[float, ...]
    """Intersection over union of each class."""
    f1: tuple[float, ...]
    """F1 (Dice) of each class."""
    accuracy: tuple[float, ...]
    """Share of the pixels of each class that are predicted as such (recall)."""
    aAcc: float
    """Share of all pixels that are right."""
    mIoU: float
    """Mean IoU over classes."""
    mAcc: float
    """Mean accuracy over classes."""
    mF1: float
    """Mean F1 over classes."""
    kappa: float = float("nan")
    """Cohen's kappa: agreement of truth and prediction beyond chance, -1..1."""
    mean_classes: tuple[str, ...] = ()
    """Classes that the means go over; none: all of them."""

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the classes that are in neither truth nor prediction."""
        return tuple(name for name, iou in zip(self.classes, self.iou, strict=True) if np.isnan(iou))

    @property
    def foreground_iou(self) -> float | None:
        """IoU of class 1 of a binary task, its headline figure; ``None`` for another number of classes."""
        return self.iou[1] if len(self.classes) == 2 else None

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(class name, IoU, F1, accuracy) of each class."""
        return list(zip(self.classes, self.iou, self.f1, self.accuracy, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``None`` for NaN; ``foreground_IoU`` only for two classes."""
        means = {name: _or_none(getattr(self, name)) for name in ("aAcc", "mIoU", "mAcc", "mF1", "kappa")}
        if self.mean_classes:
            means["mean_classes"] = list(self.mean_classes)
        headline = {"foreground_IoU": _or_none(self.iou[1])} if len(self.classes) == 2 else {}
        per_class = {
            name: {"IoU": _or_none(iou), "F1": _or_none(f1), "accuracy": _or_none(accuracy)}
            for name, iou, f1, accuracy in self.rows()
        }
        return {**headline, **means, "per_class": per_class, "absent": list(self.absent)}


class Confusion:
    """Pixel counts by true and predicted class, exact for any number of pixels (int64).

    Args:
        classes: class names in the order of their indices.
        matrix: counts to start from, [K, K] int64, rows truth, columns prediction; default: zeros.

    Raises:
        ValueError: ``matrix`` does not fit ``classes``.
    """

    def __init__(self, classes: Sequence[str], matrix: Tensor | np.ndarray | None = None) -> None:
        self.classes = tuple(classes)
        k = len(self.classes)
        self.matrix = torch.zeros(k, k, dtype=torch.int64) if matrix is None else torch.as_tensor(matrix).clone()
        if self.matrix.shape != (k, k) or self.matrix.dtype != torch.int64:
            raise ValueError(
                f"a confusion matrix of {k} classes is int64 [{k}, {k}], not "
                f"{str(self.matrix.dtype).removeprefix('torch.')} {list(self.matrix.shape)}"
            )

    def update(self, prediction: Tensor | np.ndarray, label: Tensor | np.ndarray) -> None:
        """Count pixels.

        Args:
            prediction: class indices 0..K-1, any integer type and shape.
            label: true class indices of the same shape; pixels with 255 are not counted, whatever is predicted there.

        Raises:
            ValueError: shapes differ, or an index of a counted pixel is not 0..K-1; nothing is counted then.
        """
        prediction, label = torch.as_tensor(prediction), torch.as_tensor(label)
        if prediction.shape != label.shape:
            raise ValueError(f"prediction is {list(prediction.shape)} but label is {list(label.shape)}: give one shape")
        counted = label != IGNORE
        prediction, label = prediction[counted].long().cpu(), label[counted].long().cpu()
        self._check_indices(prediction=prediction, label=label)
        k = len(self.classes)
        pairs = np.bincount((k * label + prediction).numpy(), minlength=k * k)
        self.matrix += torch.from_numpy(pairs).view(k, k)

    def _check_indices(self, **indices: Tensor) -> None:
        k = len(self.classes)
        for name, index in indices.items():
            wrong = index[(index < 0) | (index >= k)]
            if wrong.numel():
                raise ValueError(
                    f"{name} holds class index {int(wrong[0])}; with {k} classes use 0..{k - 1} or {IGNORE}"
                )

    def __add__(self, other: Confusion) -> Confusion:
        """Counts of both, e.g. of two processes."""
        if self.classes != other.classes:
            raise ValueError(
                f"cannot add confusions of classes {self.classes} and {other.classes}: use the same classes"
            )
        return Confusion(self.classes, self.matrix + other.matrix)

    def scores(self, mean_classes: Sequence[str] = ()) -> Scores:
        """Scores of the pixels counted so far.

        Args:
            mean_classes: classes that mIoU, mAcc and mF1 go over, such as all but clutter; default: all. The other
                classes' pixels still count in aAcc and kappa and as confused with these.

        Raises:
            ValueError: there is no class of that name.
        """
        if unknown := [name for name in mean_classes if name not in self.classes]:
            raise ValueError(f"mean_classes: {unknown[0]!r} is no class; classes are {', '.join(self.classes)}")
        chosen = [k for k, name in enumerate(self.classes) if not mean_classes or name in mean_classes]
        counts = self.matrix.double()
        right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        total = counts.sum()
        chance = (true * predicted).sum() / total**2
        iou = right / (true + predicted - right)
        f1 = 2 * right / (true + predicted)
        accuracy = right / true
        return Scores(
            classes=self.classes,
            iou=tuple(iou.tolist()),
            f1=tuple(f1.tolist()),
            accuracy=tuple(accuracy.tolist()),
            aAcc=(right.sum() / total).item(),
            mIoU=iou[chosen].nanmean().item(),
            mAcc=accuracy[chosen].nanmean().item(),
            mF1=f1[chosen].nanmean().item(),
            kappa=((right.sum() / total - chance) / (1 - chance)).item(),
            mean_classes=tuple(mean_classes),
        )


def _or_none(score: float) -> float | None:
    return None if np.isnan(score) else score
