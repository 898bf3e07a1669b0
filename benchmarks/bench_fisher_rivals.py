"""Our Fisher pass beside torch.func.vmap, BackPACK and Opacus on the same modules written as linear layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from models import make_batch, make_segmenter
from side_by_side import side_by_side
from torch import nn
from twin import Twin

from cegate.fisher import measure_fisher
from cegate.gate import GatePlan

SAMPLES = 4


@dataclass
class Probe:
    image: torch.Tensor
    label: torch.Tensor


def by_site(squares: dict[str, torch.Tensor]) -> dict[str, float]:
    """``layers.<layer>.<kind>...`` -> mean over samples, summed per site."""
    scores: dict[str, float] = {}
    for name, value in squares.items():
        _, layer, kind, *_ = name.split(".")
        scores[f"{kind}.{layer}"] = scores.get(f"{kind}.{layer}", 0.0) + float(value.sum()) / SAMPLES
    return scores


def with_vmap(twin: Twin, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """torch.func: the gradient function mapped over samples."""
    weights = {name: p.detach() for name, p in twin.named_parameters()}

    def loss_of_one(weights, image, label):
        return torch.func.functional_call(twin, weights, (image[None], label[None])).squeeze(0)

    grads = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))(weights, images, labels)
    return by_site({name: grad.square() for name, grad in grads.items()})


def with_backpack(twin: Twin, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """BackPACK's SumGradSquared on every linear layer."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    for layer in twin.modules():
        if isinstance(layer, nn.Linear):
            extend(layer)
    with backpack(SumGradSquared()):
        twin(images, labels).sum().backward()
    return by_site({name: p.sum_grad_squared for name, p in twin.named_parameters()})


def with_opacus(twin: Twin, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Opacus' per-sample gradients, squared."""
    from opacus import GradSampleModule

    sampled = GradSampleModule(twin, loss_reduction="sum")
    sampled(images, labels).sum().backward()
    squares = {name: p.grad_sample.square() for name, p in twin.named_parameters()}
    sampled.remove_hooks()
    for parameter in twin.parameters():
        del parameter.grad_sample
    return by_site(squares)


@pytest.mark.parametrize("rival", [with_vmap, with_backpack, with_opacus], ids=lambda way: way.__name__[5:])
def bench_fisher_beside(benchmark, rival: Callable):
    if rival is not with_vmap:
        pytest.importorskip(rival.__name__[5:])
    images, labels = make_batch("vit_t", SAMPLES)
    ours = make_segmenter("vit_t")
    with torch.no_grad():
        for parameter in ours.toolbox.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = make_segmenter("vit_t")
    theirs.toolbox.load_state_dict(ours.toolbox.state_dict())
    theirs.toolbox.apply(GatePlan())
    theirs.requires_grad_(False)
    twin = Twin(theirs, images.shape[-1])
    probe = [Probe(images, labels)]
    expected = rival(twin, images, labels)
    side_by_side(
        benchmark,
        lambda: measure_fisher(ours, ours.toolbox, probe),
        {rival.__name__[5:]: lambda: rival(twin, images, labels)},
        rounds=3,
        target={rival.__name__[5:]: "< 1"},
    )
    diagonal = measure_fisher(ours, ours.toolbox, probe, diagonal=True)
    for site, score in expected.items():
        own = sum(float(v.sum()) for n, v in diagonal.items() if n.startswith(f"{site}.") and not n.endswith("scale"))
        assert own == pytest.approx(score, rel=1e-2), site
