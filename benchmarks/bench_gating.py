"""What gating costs: nothing when off, and when on no more than a model that holds only the active sites."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from models import SIZES, make_batch, make_segmenter
from side_by_side import side_by_side
from torch import nn

from cegate.gate import GatePlan, select_top_k

K = 18


@pytest.mark.parametrize("size", SIZES)
def bench_forward_with_all_gates_off(benchmark, size):
    name, patch, pixels, _ = SIZES[size]
    images, _ = make_batch(size)
    segmenter = make_segmenter(size)
    bare = timm.create_model(
        name, pretrained=False, num_classes=0, img_size=pixels, patch_size=patch, dynamic_img_size=True
    ).eval()
    bare.load_state_dict(segmenter.vit.state_dict())
    with torch.no_grad():
        got = side_by_side(
            benchmark,
            lambda: segmenter.vit.forward_features(images),
            {"bare timm model": lambda: bare.forward_features(images)},
            rounds=30 if size == "vit_t" else 7,
            warmup=2,
            target={"bare timm model": "<= 1.02"},
        )
        assert torch.equal(got, bare.forward_features(images))


def training_step(segmenter, images, labels, optimiser):
    """One optimiser step; returns the loss."""
    optimiser.zero_grad(set_to_none=True)
    loss = segmenter.loss(images, labels).mean()
    loss.backward()
    optimiser.step()
    return loss.item()


@pytest.mark.parametrize("size", SIZES)
def bench_training_step_with_18_sites(benchmark, size):
    images, labels = make_batch(size)
    gated = make_segmenter(size)
    scores = {site: torch.rand(()).item() for site in gated.toolbox.sites}
    gated.toolbox.apply(select_top_k(scores, K))
    only = copy.deepcopy(gated)
    drop_idle_sites(only.toolbox)
    optimisers = {
        name: torch.optim.AdamW([*model.toolbox.parameters(), *model.head.parameters()], lr=1e-4)
        for name, model in (("gated", gated), ("only", only))
    }
    curves = {"gated": [], "only": []}
    side_by_side(
        benchmark,
        lambda: curves["gated"].append(training_step(gated, images, labels, optimisers["gated"])),
        {"only those sites": lambda: curves["only"].append(training_step(only, images, labels, optimisers["only"]))},
        rounds=15 if size == "vit_t" else 5,
        target={"only those sites": "<= 1.03"},
    )
    assert curves["gated"] == curves["only"]
    assert len(set(curves["gated"])) > 1


def drop_idle_sites(toolbox: nn.Module) -> None:
    """Delete the modules of every site that is off, so that the model holds only the active ones."""
    active = set(toolbox.plan.active)
    for name in [site for site in toolbox.sites if site not in active]:
        kind, layer = name.split(".")
        getattr(toolbox, kind)[int(layer)] = nn.Identity()
        del toolbox._sites[name]
    assert sorted(toolbox.sites) == sorted(active)
    assert toolbox.plan == GatePlan(active)
