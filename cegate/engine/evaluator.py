"""Sliding-window evaluation of a segmenter on labelled sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from cegate.checkpoint import load_checkpoint
from cegate.config import Config
from cegate.configfile import SOURCE_DOMAIN
from cegate.data.datasets import SegmentationSet
from cegate.data.stream import EvalStream
from cegate.engine.sets import open_evaluated
from cegate.errors import CheckpointError, ConfigError
from cegate.losses import pixel_cross_entropy
from cegate.metrics import Confusion, Scores
from cegate.models.compute import Precision, pick_device, precision_of
from cegate.models.head import likeliest_class
from cegate.models.segmenter import Segmenter
from cegate.models.sliding import slide
from cegate.runfolder import RunFolder, writable_folder, write_json, write_text, written_aside


@dataclass(frozen=True)
class Tiles:
    """Counts of every image by itself."""

    names: list[str]
    confusion: np.ndarray
    """[T, K, K] int64, rows truth."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one domain."""

    domain: str
    confusion: Confusion
    loss: float
    """Mean over images of the mean cross entropy of their valid pixels."""
    tiles: Tiles

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.tiles.names)

    @property
    def scores(self) -> Scores:
        """Scores of the domain."""
        return self.confusion.scores()


@torch.no_grad()
def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationSet,
    *,
    crop: int,
    stride: int | None = None,
    batch: int | None = None,
    workers: int = 0,
    precision: Precision = nullcontext,
    part: range | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Segment every image of a set with a sliding window and count against its labels.

    Args:
        segmenter: put into evaluation mode for the time being.
        dataset: labelled images; its name becomes the domain.
        crop: window side in pixels; a smaller image is filled up, and only its own pixels count.
        stride: step in pixels; default two thirds of the window.
        batch: windows per forward pass; it does not change the result.
        workers: processes that read ahead.
        precision: makes the autocast context of a forward pass.
        part: images of the set to take, in a row; default: all. `join` puts parts together.
        progress: told the number of images that are done.

    Raises:
        DataError: an image or mask cannot be read; the file is named.
    """
    names: list[str] = []
    tiles: list[np.ndarray] = []
    loss_sum = 0.0
    was_training = segmenter.training
    segmenter.eval()
    stream = EvalStream(dataset, mean=segmenter.mean, std=segmenter.std)
    try:
        part = range(len(dataset)) if part is None else part
        for item in stream.loader(part.start, part.stop, workers=workers):
            windows = {"crop": crop, "stride": stride, "batch": batch, "fit": dataset.fit}
            logits = predict_logits(segmenter, item.image, precision=precision, **windows)
            loss_sum += pixel_cross_entropy(logits, item.label.to(logits.device)).item()
            tile = Confusion(segmenter.classes)
            tile.update(likeliest_class(logits).cpu(), item.label)
            names += item.names
            tiles.append(tile.matrix.numpy())
            if progress is not None:
                progress(len(tiles))
    finally:
        segmenter.train(was_training)
    kinds = len(segmenter.classes)
    counts = np.array(tiles, np.int64).reshape(-1, kinds, kinds)
    confusion = Confusion(segmenter.classes, counts.sum(axis=0))
    return Evaluation(dataset.name, confusion, loss_sum / max(len(names), 1), Tiles(names, counts))


def join(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of a whole set, of those of its parts in order."""
    if len(parts) == 1:
        return parts[0]
    names = [name for part in parts for name in part.tiles.names]
    counts = np.concatenate([part.tiles.confusion for part in parts])
    loss = sum(part.loss * part.images for part in parts) / len(names)
    confusion = Confusion(parts[0].confusion.classes, counts.sum(axis=0))
    return Evaluation(parts[0].domain, confusion, loss, Tiles(names, counts))


@torch.no_grad()
def predict_logits(
    segmenter: Segmenter,
    image: Tensor,
    *,
    crop: int,
    stride: int | None = None,
    batch: int | None = None,
    fit: int | None = None,
    precision: Precision = nullcontext,
) -> Tensor:
    """Logits [1, K, H, W] float32 of one normalised image [1, C, H, W], by sliding window.

    With ``fit`` the windows slide over the image shrunk to fit a square of that side, and the logits are enlarged
    again; a smaller image stays as it is.
    """
    if fit is not None and max(image.shape[-2:]) > fit:
        size = [max(1, round(side * fit / max(image.shape[-2:]))) for side in image.shape[-2:]]
        shrunk = F.interpolate(image, size, mode="bilinear", antialias=True)
        logits = predict_logits(segmenter, shrunk, crop=crop, stride=stride, batch=batch, precision=precision)
        return F.interpolate(logits, image.shape[-2:], mode="bilinear")
    with precision():
        shares = segmenter.head.log_shares
        return slide(segmenter, image.to(segmenter.device), crop, stride, batch=batch, log_shares=shares)


def evaluate_run(
    run: RunFolder, config: Config, *, checkpoint: str = "best", output: Path | None = None, overwrite: bool = False
) -> list[Evaluation]:
    """Evaluate a checkpoint of a run on the validation and target sets of a configuration.

    Args:
        run: the run.
        config: its configuration, perhaps with other sets, device or precision.
        checkpoint: ``best``, ``last``, or the path of a checkpoint.
        output: folder that gets the files of `write_evaluation`, one folder per domain.
        overwrite: existing ones may be replaced.

    Raises:
        ConfigError: there is nothing to evaluate on.
        CheckpointError: the checkpoint does not fit, or output is taken.
        DataError: a set cannot be read.
    """
    data = config.data
    domains = [*([SOURCE_DOMAIN] if data.validation is not None else []), *data.targets]
    if not domains:
        raise ConfigError("there is nothing to evaluate on; give --data.targets.<name>.root DIR")
    for domain in domains if output is not None and not overwrite else ():
        if (output / domain).exists():
            raise CheckpointError(f"{output / domain} exists; give another --output, or --overwrite to replace it")
    if output is not None:
        writable_folder(output, "--output")
    device = pick_device(config.run.device)
    segmenter = load_checkpoint(run, checkpoint, config, device)
    validation, targets = open_evaluated(data, data.classes, segmenter.pixel_range)
    sets = [*([validation] if validation is not None else []), *targets]
    for dataset in sets:
        dataset.check()
    _, precision = precision_of(config.run.precision, device)
    workers = data.workers if device.type == "cuda" else 0
    evaluations = [
        evaluate(segmenter, dataset, crop=data.crop, stride=data.stride, workers=workers, precision=precision)
        for dataset in sets
    ]
    for evaluation in evaluations if output is not None else ():
        write_evaluation(output / evaluation.domain, evaluation, run=str(run.path), checkpoint=checkpoint)
    return evaluations


def write_evaluation(folder: Path, evaluation: Evaluation, **more: Any) -> None:
    """Write metrics.json, confusion.npy (int64, rows truth), tiles.npz (the same of each image) and per_class.csv.

    Args:
        folder: ``eval/<domain>`` of a run.
        evaluation: what was measured.
        more: further entries of metrics.json.
    """
    scores = evaluation.scores
    write_json(
        folder / "metrics.json",
        {"domain": evaluation.domain, "images": evaluation.images, "loss": evaluation.loss, **scores.to_dict(), **more},
    )
    with written_aside(folder / "confusion.npy") as aside, aside.open("wb") as file:
        np.save(file, evaluation.confusion.matrix.numpy())
    with written_aside(folder / "tiles.npz") as aside, aside.open("wb") as file:
        np.savez_compressed(file, names=np.array(evaluation.tiles.names), confusion=evaluation.tiles.confusion)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "IoU", "F1", "accuracy"])
    for name, *values in scores.rows():
        writer.writerow([name, *("" if np.isnan(value) else f"{value:.6f}" for value in values)])
    write_text(folder / "per_class.csv", text.getvalue())


def table_of(evaluations: list[Evaluation]) -> Table:
    """Per-class IoU, F1 and accuracy and their means, in percent, one block per domain."""
    table = Table(title="Evaluation (%)")
    for column in ("domain", "class"):
        table.add_column(column)
    for column in ("IoU", "F1", "accuracy"):
        table.add_column(column, justify="right")
    for evaluation in evaluations:
        scores = evaluation.scores
        for row, (name, *values) in enumerate(scores.rows()):
            table.add_row(evaluation.domain if row == 0 else "", name, *map(percent, values))
        means = (scores.mIoU, scores.mF1, scores.mAcc)
        note = f" (without {', '.join(scores.absent)}: absent)" if scores.absent else ""
        table.add_row("", f"[bold]mean{note}", *(f"[bold]{percent(value)}" for value in means))
        table.add_row("", "all pixels", "", "", percent(scores.aAcc), end_section=True)
    return table


def percent(share: float | None) -> str:
    """A share as percent with one decimal; a dash where it is undefined."""
    return "–" if share is None or np.isnan(share) else f"{100 * share:.1f}"
