"""The pictures of a finished run: gate, curves, and what the model sees on a few images of each domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cegate import figures
from cegate.checkpoint import load_state, restore
from cegate.compute import Precision
from cegate.data.sets import Item, SegmentationSet
from cegate.data.transforms import normalise
from cegate.engine.evaluator import predictor_of, windows_of
from cegate.engine.stage import Stage
from cegate.runfolder import RunFolder
from cegate.scenes.mosaic import Pixels
from cegate.scenes.sink import ClassArray
from cegate.segmenter import Segmenter
from cegate.tasks.task import Task


def draw_run(
    run: RunFolder,
    segmenter: Segmenter,
    sets: Sequence[SegmentationSet],
    *,
    checkpoints: dict[str, Path],
    backbone_sha256: str,
    precision: Precision,
) -> None:
    """Write figures/: gate.png where there are gates, curves.png, and panels_<domain>.png.

    Args:
        run: whose journals are drawn.
        segmenter: the model; afterwards it holds the last of the checkpoints.
        sets: domains to show.
        checkpoints: column title -> checkpoint whose masks are shown.
        backbone_sha256: `weight_hash` of the backbone as it was loaded.
        precision: makes the autocast context of a forward pass.
    """
    folder, rounds = run.figures, run.gates.records
    figures.draw_curves(run.metrics.records, folder / "curves.png")
    if any(record["scores"] or record["active"] for record in rounds):
        figures.draw_gate(rounds, segmenter.toolbox.sites, folder / "gate.png")
    shown = {data.name: [data.read(index) for index in range(min(len(data), figures.PANEL_ROWS))] for data in sets}
    masks: dict[str, dict[str, list[np.ndarray]]] = {}
    for title, checkpoint in checkpoints.items():
        restore(segmenter, load_state(checkpoint), checkpoint, backbone_sha256=backbone_sha256)
        masks[title] = {
            domain: [mask_of(segmenter, item, precision) for item in items] for domain, items in shown.items()
        }
    for domain, items in shown.items():
        drawn = {title: by_domain[domain] for title, by_domain in masks.items()}
        recipe, path = segmenter.recipe, folder / f"panels_{domain}.png"
        second = {} if recipe.second is None else {"second": recipe.second.name}
        figures.draw_panels(items, drawn, recipe.classes, recipe.palette, path, **second)


@torch.no_grad()
def draw_tasks(run: RunFolder, stage: Stage, checkpoint: Path) -> None:
    """Write figures/restored.png where tasks have something to show: crops of the source, styled, masked and restored.

    Args:
        run: its folder.
        stage: whose network holds the checkpoint; afterwards its tasks do too.
        checkpoint: with the weights of what tasks train.
    """
    shows = [task for task in stage.tasks if type(task).pictures is not Task.pictures]
    if not shows:
        return
    stage.load_task_weights(load_state(checkpoint))
    rows: dict[str, list[np.ndarray]] = {}
    first = 0
    for batch in stage.tasks[0].probe(0):
        step = stage.clean_step(batch, range(first, first := first + len(batch)))
        with stage.numerics.precision():
            shown = {"image": batch.image} | {k: v for task in shows for k, v in task.pictures(step).items()}
        for title, images in shown.items():
            rows.setdefault(title, []).extend(images.float().cpu().numpy())
        if first >= figures.PANEL_ROWS:
            break
    recipe = stage.network.recipe
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in (recipe.mean, recipe.std))
    drawn = {title: [image * std + mean for image in images[: figures.PANEL_ROWS]] for title, images in rows.items()}
    figures.draw_images(drawn, run.figures / figures.RESTORED)


def mask_of(segmenter: Segmenter, item: Item, precision: Precision) -> np.ndarray:
    """Predicted class of every pixel of an item, [H, W] uint8."""
    image = torch.from_numpy(normalise(item.image, *segmenter.recipe.statistics))
    predictor = predictor_of(segmenter, **windows_of(segmenter.config), fit=item.fit, precision=precision)
    sink = ClassArray(tuple(image.shape[1:]))
    predictor.run(Pixels(image), sink)
    return sink.array
