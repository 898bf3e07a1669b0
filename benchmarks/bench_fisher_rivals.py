"""Our Fisher pass beside torch.func.vmap, BackPACK and Opacus on the same modules written as linear layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_side_by_side import gpu_side_by_side, needs_gpu
from models import VIT_L_512, Probe, Size, make_batch, make_segmenter, mixed_precision, perturb
from side_by_side import side_by_side
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from twin import Twin

from cegate.fisher import measure_fisher
from cegate.segmenter import Segmenter

SAMPLES = 4
DEVICE, GPU_SIZE, GPU_SAMPLES, ROUNDS = "cuda", VIT_L_512, 16, 5


def by_site(squares: dict[str, torch.Tensor], samples: int) -> dict[str, float]:
    """``layers.<layer>.<kind>...`` -> mean over samples, summed per site."""
    sums: dict[str, torch.Tensor] = {}
    for name, value in squares.items():
        _, layer, kind, *_ = name.split(".")
        sums[f"{kind}.{layer}"] = sums.get(f"{kind}.{layer}", 0) + value.sum(dtype=torch.float32)
    scores = torch.stack(list(sums.values())) / samples
    return dict(zip(sums, scores.tolist(), strict=True))


def with_vmap(twin: Twin, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """torch.func: the gradient function mapped over samples."""
    weights = {name: p.detach() for name, p in twin.named_parameters()}

    def loss_of_one(weights, image, label):
        return torch.func.functional_call(twin, weights, (image[None], label[None])).squeeze(0)

    grads = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))(weights, images, labels)
    return by_site({name: grad.square() for name, grad in grads.items()}, len(images))


def with_backpack(twin: Twin, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """BackPACK's SumGradSquared on every linear layer."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    for layer in twin.modules():
        if isinstance(layer, nn.Linear):
            extend(layer)
    with backpack(SumGradSquared()):
        twin(images, labels).sum().backward()
    return by_site({name: p.sum_grad_squared for name, p in twin.named_parameters()}, len(images))


def with_opacus(twin: Twin, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Opacus' per-sample gradients, squared."""
    from opacus import GradSampleModule

    sampled = GradSampleModule(twin, loss_reduction="sum")
    sampled(images, labels).sum().backward()
    squares = {name: p.grad_sample.square() for name, p in twin.named_parameters()}
    sampled.remove_hooks()
    for parameter in twin.parameters():
        del parameter.grad_sample
    return by_site(squares, len(images))


def with_vmap_and_math_attention(twin: Twin, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The same for where fused attention kernels cannot be mapped."""
    with sdpa_kernel(SDPBackend.MATH):
        return with_vmap(twin, images, labels)


RIVALS = {"vmap": with_vmap, "backpack": with_backpack, "opacus": with_opacus}
MAPPED = {"vmap with math attention": with_vmap_and_math_attention}


def make_models(size: Size | str, device: str) -> tuple[Segmenter, Twin]:
    """A segmenter with all sites, and its twin on another backbone, since both hook into theirs."""
    ours = perturb(make_segmenter(size)).to(device)
    theirs = make_segmenter(size).to(device)
    theirs.toolbox.load_state_dict(ours.toolbox.state_dict())
    theirs.requires_grad_(False)
    return ours, Twin(theirs, theirs.config.data.crop)


def score(model: Segmenter, probe: list[Probe]) -> dict[str, float]:
    """The Fisher pass, without the scales that the twin holds constant."""
    scores = dict.fromkeys(model.toolbox.sites, 0.0)
    for name, value in measure_fisher(model, model.toolbox, probe, diagonal=True).items():
        site, _, weight = name.rpartition(".")
        scores[site] += 0.0 if weight == "scale" else float(value.sum())
    return scores


@pytest.mark.parametrize("name", RIVALS)
def bench_fisher_beside(benchmark, name: str):
    if name != "vmap":
        pytest.importorskip(name)
    images, labels = make_batch("vit_t", SAMPLES)
    ours, twin = make_models("vit_t", "cpu")
    probe = [Probe(images, labels)]
    expected = RIVALS[name](twin, images, labels)
    side_by_side(
        benchmark,
        lambda: measure_fisher(ours, ours.toolbox, probe),
        {name: lambda: RIVALS[name](twin, images, labels)},
        rounds=3,
        target={name: "< 1"},
    )
    assert score(ours, probe) == pytest.approx(expected, rel=1e-2)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", RIVALS | MAPPED)
def bench_fisher_beside_on_the_gpu(benchmark, name: str):
    """The paper's model and probe in bfloat16."""
    if name in ("backpack", "opacus"):
        pytest.importorskip(name)
    images, labels = make_batch(GPU_SIZE, GPU_SAMPLES, DEVICE)
    ours, twin = make_models(GPU_SIZE, DEVICE)
    probe = [Probe(images, labels)]

    def candidate() -> dict[str, float]:
        return measure_fisher(ours, ours.toolbox, probe, precision=partial(mixed_precision, DEVICE))

    def rival() -> dict[str, float]:
        with mixed_precision(DEVICE):
            return (RIVALS | MAPPED)[name](twin, images, labels)

    try:
        expected = rival()
    except RuntimeError as error:  # out of memory, or an operator that the library cannot handle
        pytest.skip(f"{name} cannot run this model: {str(error).splitlines()[0]}")
    with mixed_precision(DEVICE):
        assert score(ours, probe) == pytest.approx(expected, rel=0.1)
    ways = {"candidate": candidate, name: rival}
    gpu_side_by_side(benchmark, ways, targets={name: "< 1"}, rounds=ROUNDS, warmup=1)
