"""A whole step of CrossEarth beside a plain step of Rein, and what its style networks add to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from gpu_side_by_side import gpu_side_by_side, needs_gpu
from models import CLASSES, SIZES, VIT_L_512, Size
from side_by_side import side_by_side

from cegate.checkpoint import trained_weights
from cegate.compute import precision_of
from cegate.configfile import read_config
from cegate.engine.sets import open_sets
from cegate.engine.stage import Numerics, Stage
from cegate.engine.team import Team
from cegate.segmenter import build
from cegate.style.networks import StyleNetworks
from cegate.style.statistics import StyleStatistics
from cegate.tasks.styling import Styling

DEVICE, ROUNDS, HEAD = "cuda", 9, "mask2former"  # the head of the paper


def make_stage(
    folder: Path, size: Size, method: str, batch: int, *, styled: bool = False, device: str, head: str = HEAD
) -> Stage:
    """A stage on generated scenes, with style networks of random weights; all or none of its iterations are styled."""
    weights, statistics = folder / "style.safetensors", folder / "style.npz"
    if not weights.is_file():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            safetensors.torch.save_file(StyleNetworks().state_dict(), weights)
        StyleStatistics(np.zeros(100), np.eye(100)).save(statistics)
    config = read_config(
        {
            "run": {"method": method, "device": device, "work_dir": str(folder / method)},
            "data": {
                "classes": ["background", "building", "forest", "road", "water", *CLASSES][:5],
                "source": {"kind": "generated", "split": "temperate", "limit": batch, "tile": size.pixels},
                **{"crop": size.pixels, "batch_size": batch, "workers": 0},
            },
            "model": {
                **{"backbone": size.backbone, "patch_size": size.patch, "weights": "none"},
                "head": head,
            },
            "style": {"weights": str(weights), "statistics": str(statistics), "probability": float(styled)},
        },
        training=True,
    )
    config, sets = open_sets(config)
    network = build(config).to(device)
    numerics = Numerics(network.device, *precision_of("auto", network.device))
    initial = {name: value.clone() for name, value in trained_weights(network).items()}
    return Stage("after", config, network, sets, numerics, Team(), initial)


def step_of(stage: Stage) -> Callable[[], float]:
    """The same iteration again and again: equal data, equal draws."""
    data = stage.stream.batch(0)

    def step() -> float:
        stage.iteration = 0
        return stage.step(data)

    return step


def segmentation_loss(stage: Stage) -> float:
    """Before any step, of the images as they are; Mask2Former draws its points from torch's own generator."""
    torch.manual_seed(0)
    step = stage.clean_step(stage.stream.batch(0).source.to(stage.network.device), range(stage.config.data.batch_size))
    with torch.no_grad(), stage.numerics.precision():
        stage.tasks[0].prepare(step)
        step.encode()
        return float(stage.tasks[0].terms(step)[0].losses.mean())


def restyle(stage: Stage) -> Callable[[], torch.Tensor]:
    """The style networks alone, on the batch."""
    (styling,) = (task for task in stage.tasks if isinstance(task, Styling))
    step = stage.clean_step(stage.stream.batch(0).source.to(stage.network.device), range(stage.config.data.batch_size))
    return lambda: styling.pictures(step)["styled"]


def ways(folder: Path, size: Size, batch: int, device: str, head: str = HEAD) -> dict[str, Callable[[], object]]:
    """Steps that start from equal losses, since a fresh injection changes nothing."""
    rein = make_stage(folder, size, "rein", batch, device=device, head=head)
    plain = make_stage(folder, size, "crossearth", batch, device=device, head=head)
    styled = make_stage(folder, size, "crossearth", batch, styled=True, device=device, head=head)
    first = {segmentation_loss(stage) for stage in (rein, plain, styled)}
    assert len(first) == 1, first
    changed = restyle(styled)()
    assert torch.isfinite(changed).all()
    return {
        "CrossEarth, not styled": step_of(plain),
        "Rein": step_of(rein),
        "CrossEarth, styled": step_of(styled),
        "style networks": restyle(styled),
    }


@pytest.mark.parametrize("head", ["linear", HEAD])
@pytest.mark.parametrize("batch", [1, 4])
def bench_crossearth_step(benchmark, tmp_path, batch, head):
    candidate, *others = ways(tmp_path, SIZES["vit_t"], batch, "cpu", head).items()
    loss = side_by_side(benchmark, candidate[1], dict(others), rounds=ROUNDS, target={"Rein": "<= 1.5"})
    assert np.isfinite(loss)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4])
def bench_crossearth_step_at_full_size(benchmark, tmp_path, batch):
    """Of the style networks a tenth counts: at most 0.05 of a step, so at most 0.5 of one where they run."""
    found = ways(tmp_path, VIT_L_512, batch, DEVICE)
    gpu_side_by_side(benchmark, found, targets={"Rein": "<= 1.5", "style networks": ">= 2"}, rounds=ROUNDS)
