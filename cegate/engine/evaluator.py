"""Sliding-window evaluation of a segmenter on labelled sets."""

from __future__ import annotations

import csv
import io
import logging
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
from cegate.compute import Precision, pick_device, precision_of
from cegate.config import IGNORE, SOURCE_DOMAIN, Config
from cegate.configfile import domain_title
from cegate.data.sets import SegmentationSet
from cegate.data.stream import EvalStream
from cegate.engine.sets import open_evaluated
from cegate.errors import CheckpointError, ConfigError
from cegate.figures import headline
from cegate.metrics import Confusion, Scores
from cegate.parts.streams import lose_modality
from cegate.runfolder import RunFolder, writable_folder, write_json, write_text, written_aside
from cegate.scenes.mosaic import Mosaic, Pixels, Rows
from cegate.scenes.predictor import Predictor, evaluation_mode
from cegate.scenes.sink import likeliest_class
from cegate.segmenter import Segmenter

log = logging.getLogger(__name__)

RASTERS = ("image", "second")
"""What a model of two rasters may have to do without."""


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
    mean_classes: tuple[str, ...] = ()
    """Classes that means go over; none: all."""

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.tiles.names)

    @property
    def scores(self) -> Scores:
        """Scores of the domain."""
        return self.confusion.scores(self.mean_classes)


class Tally:
    """Counts an image against its labels, row after row.

    Attributes:
        confusion: its pixels by true and predicted class.
    """

    def __init__(self, classes: Sequence[str], label: Tensor) -> None:
        self.confusion = Confusion(classes)
        self._label, self._losses, self._valid = label, 0.0, 0  # label [H, W]

    def add(self, rows: Rows) -> None:
        """The next rows."""
        label = self._label[rows.place]
        self.confusion.update(likeliest_class(rows.logits).cpu(), label)
        sums, valid = sum_of_cross_entropy(rows.logits, label.to(rows.logits.device))
        self._losses, self._valid = self._losses + sums, self._valid + valid

    @property
    def loss(self) -> float:
        """Mean cross entropy of the valid pixels so far; 0 without any."""
        return float(self._losses) / max(int(self._valid), 1)


def sum_of_cross_entropy(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over valid pixels of the cross entropy of [K, n, W] logits, in float64, and how many are valid."""
    losses = F.cross_entropy(logits[None], label[None], ignore_index=IGNORE, reduction="none")
    # float64: rows of a scene add up to billions of pixels
    return losses.sum(dtype=torch.float64), (label != IGNORE).sum()


def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationSet,
    *,
    crop: int,
    stride: int | None = None,
    blend: str = "none",
    tta: str = "none",
    batch: int | None = None,
    mean_classes: Sequence[str] = (),
    workers: int = 0,
    precision: Precision = nullcontext,
    part: range | None = None,
    without: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Segment every image of a set with a sliding window and count against its labels.

    Args:
        segmenter: put into evaluation mode for the time being.
        dataset: labelled images; its name becomes the domain.
        crop: window side in pixels; a smaller image is filled up, and only its own pixels count.
        stride: step in pixels; default two thirds of the window.
        blend: how windows that overlap are weighed, see `cegate.scenes.mosaic.Mosaic`; ``none`` is published.
        tta: test-time augmentation, see `cegate.scenes.predictor.TTA`.
        batch: windows per forward pass; it does not change the result.
        mean_classes: classes that means go over; default: all.
        workers: processes that read ahead.
        precision: makes the autocast context of a forward pass.
        part: images of the set to take, in a row; default: all. `join` puts parts together.
        without: ``image`` or ``second``, the raster that the model is not shown; the domain is named after it.
        progress: told the number of images that are done.

    Raises:
        DataError: an image or mask cannot be read; the file is named.
    """
    names: list[str] = []
    tiles: list[np.ndarray] = []
    loss_sum = 0.0
    windows = {"crop": crop, "stride": stride, "blend": blend, "tta": tta, "batch": batch, "fit": dataset.fit}
    predictor = predictor_of(segmenter, precision=precision, **windows)
    part = range(len(dataset)) if part is None else part
    stream = EvalStream(dataset, mean=segmenter.recipe.mean, std=segmenter.recipe.std)
    with evaluation_mode(segmenter):
        for item in stream.loader(part.start, part.stop, workers=workers):
            tally = Tally(segmenter.classes, item.label[0])
            images = item.image
            if without is not None:
                images = lose_modality(images, dataset.channels, torch.tensor([RASTERS.index(without)]))
            for rows in predictor.rows(Pixels(images[0])):
                tally.add(rows)
            loss_sum += tally.loss
            names += item.names
            tiles.append(tally.confusion.matrix.numpy())
            if progress is not None:
                progress(len(tiles))
    kinds = len(segmenter.classes)
    counts = np.array(tiles, np.int64).reshape(-1, kinds, kinds)
    confusion = Confusion(segmenter.classes, counts.sum(axis=0))
    loss = loss_sum / max(len(names), 1)
    domain = dataset.name if without is None else f"{dataset.name}_without_{without}"
    return Evaluation(domain, confusion, loss, Tiles(names, counts), tuple(mean_classes))


def join(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of a whole set, of those of its parts in order."""
    if len(parts) == 1:
        return parts[0]
    names = [name for part in parts for name in part.tiles.names]
    counts = np.concatenate([part.tiles.confusion for part in parts])
    loss = sum(part.loss * part.images for part in parts) / len(names)
    confusion = Confusion(parts[0].confusion.classes, counts.sum(axis=0))
    return Evaluation(parts[0].domain, confusion, loss, Tiles(names, counts), parts[0].mean_classes)


def windows_of(config: Config) -> dict[str, Any]:
    """How a configuration has whole images predicted, as arguments of `evaluate` and `predictor_of`."""
    data, how = config.data, config.evaluate
    return {"crop": data.crop, "stride": how.stride or data.stride, "blend": how.blend, "tta": how.tta}


def predictor_of(
    segmenter: Segmenter, *, precision: Precision = nullcontext, tta: str = "none", **windows: Any
) -> Predictor:
    """What puts normalised images through a segmenter.

    Args:
        segmenter: the model.
        precision: makes the autocast context of a forward pass.
        tta: test-time augmentation, see `cegate.scenes.predictor.TTA`.
        windows: fields of `cegate.scenes.mosaic.Mosaic`; ``crop`` is needed.
    """
    further = segmenter.recipe.further
    mosaic = Mosaic(**windows, log_shares=segmenter.head.log_shares, further=further)
    return Predictor(segmenter, mosaic, segmenter.device, precision, segmenter, tta)


def predict_logits(
    segmenter: Segmenter, image: Tensor, *, precision: Precision = nullcontext, **windows: Any
) -> Tensor:
    """Logits [1, K, H, W] float32 of one normalised image [1, C, H, W]; arguments as of `predictor_of`."""
    parts = predictor_of(segmenter, precision=precision, **windows).rows(Pixels(image[0]))
    return torch.cat([rows.logits for rows in parts], dim=1)[None]


def evaluate_run(
    run: RunFolder,
    config: Config,
    *,
    checkpoint: str = "best",
    without: Sequence[str] = (),
    output: Path | None = None,
    overwrite: bool = False,
) -> list[Evaluation]:
    """Evaluate a checkpoint of a run on the validation and target sets of a configuration.

    Args:
        run: the run.
        config: its configuration, perhaps with other sets, device or precision.
        checkpoint: ``best``, ``last``, or the path of a checkpoint.
        without: measure every set once more without its ``image``, and without its ``second`` raster.
        output: folder that gets the files of `write_evaluation`, one folder per domain.
        overwrite: existing ones may be replaced.

    Raises:
        ConfigError: there is nothing to evaluate on, or nothing to do without.
        CheckpointError: the checkpoint does not fit, or output is taken.
        DataError: a set cannot be read.
    """
    data = config.data
    domains = [*([SOURCE_DOMAIN] if data.validation is not None else []), *data.targets]
    if not domains:
        raise ConfigError("there is nothing to evaluate on; give --data.targets.<name>.root DIR")
    shown = (None, *dict.fromkeys(without))  # of each set
    folders = [domain if lost is None else f"{domain}_without_{lost}" for domain in domains for lost in shown]
    for domain in folders if output is not None and not overwrite else ():
        if (output / domain).exists():
            raise CheckpointError(f"{output / domain} exists; give another --output, or --overwrite to replace it")
    if output is not None:
        writable_folder(output, "--output")
    device = pick_device(config.run.device)
    segmenter = load_checkpoint(run, checkpoint, config, device)
    _refuse_nothing_to_lose(without, segmenter)
    validation, targets = open_evaluated(data, data.classes, segmenter.pixel_range, seed=config.run.seed)
    sets = [*([validation] if validation is not None else []), *targets]
    for dataset in sets:
        _refuse_other_rasters(dataset, segmenter)
        dataset.check()
    _, precision = precision_of(config.run.precision, device)
    workers = data.workers if device.type == "cuda" else 0
    how = {"mean_classes": config.evaluate.mean_classes, "workers": workers, "precision": precision}
    how |= windows_of(config)
    evaluations = [evaluate(segmenter, dataset, without=lost, **how) for dataset in sets for lost in shown]
    for evaluation in evaluations if output is not None else ():
        write_evaluation(output / evaluation.domain, evaluation, run=str(run.path), checkpoint=checkpoint)
    return evaluations


def _refuse_nothing_to_lose(without: Sequence[str], segmenter: Segmenter) -> None:
    if unknown := [name for name in without if name not in RASTERS]:
        raise ConfigError(f"there is no raster {unknown[0]!r} to do without; name {' or '.join(RASTERS)}")
    second = segmenter.recipe.second
    if without and second is None:
        raise ConfigError("the model learned from images alone and can do without nothing; leave out without")
    if unlearned := [name for name in without if name not in second.dispensable]:
        log.warning("the model never learned to do without: %s; it is measured all the same", ", ".join(unlearned))


def _refuse_other_rasters(dataset: SegmentationSet, segmenter: Segmenter) -> None:
    wanted, found = segmenter.recipe.further, sum(dataset.channels[1:])
    if wanted != found:
        lacks = "give the set second, with missing: allow where the model may do without" if wanted else "leave it out"
        has = f"{found or 'no'} bands of a second raster, the model takes {wanted or 'none'}"
        raise ConfigError(f"set {dataset.name!r} has {has}; {lacks}")


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
        scores, rows = evaluation.scores, evaluation.scores.rows()
        binary = headline(scores.to_dict())[0] != "mIoU"  # the foreground leads
        for row, (name, *values) in enumerate(reversed(rows) if binary else rows):
            style = "bold" if binary and row == 0 else None
            table.add_row(domain_title(evaluation.domain) if row == 0 else "", name, *map(percent, values), style=style)
        means = (scores.mIoU, scores.mF1, scores.mAcc)
        note = f" (without {', '.join(scores.absent)}: absent)" if scores.absent else ""
        if scores.mean_classes:
            note = f" (of {len(scores.mean_classes)} classes)" + note
        table.add_row("", f"mean{note}", *map(percent, means), style=None if binary else "bold")
        table.add_row("", "all pixels", "", "", percent(scores.aAcc), end_section=True)
    return table


def percent(share: float | None) -> str:
    """A share as percent with one decimal; a dash where it is undefined."""
    return "–" if share is None or np.isnan(share) else f"{100 * share:.1f}"
