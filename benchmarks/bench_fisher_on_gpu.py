"""One Fisher pass over the probe of the paper's model, in bfloat16 on a GPU: time, memory, and the scores."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pytest
import torch
from gpu_side_by_side import gpu_side_by_side, needs_gpu
from memory import peak_bytes
from models import VIT_L_512, Probe, make_batch, make_segmenter, mixed_precision, perturb
from side_by_side import note
from torch import Tensor

from cegate.fisher import measure_fisher
from cegate.gate import GatePlan
from cegate.segmenter import Segmenter

DEVICE, SIZE, SAMPLES, ROUNDS = "cuda", VIT_L_512, 16, 10
TARGETS = {"plain forward + backward": "<= 1.15", "loop over samples": "<= 0.67"}
TOLERANCE = 0.1  # of a site's score: a gradient in bfloat16 through 24 layers is good to some per cent


def fisher_pass(model: Segmenter, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What the trainer runs."""
    return measure_fisher(model, model.toolbox, [Probe(images, labels)], precision=partial(mixed_precision, DEVICE))


def plain_pass(model: Segmenter, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all sites for all samples together."""
    with mixed_precision(DEVICE):
        loss = model.loss(images, labels).sum()
    return torch.autograd.grad(loss, list(model.toolbox.parameters()))


def loop_over_samples(model: Segmenter, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The definition, without a wait for the GPU before the end."""
    sizes = {site: len(model.toolbox.parameters_of(site)) for site in model.toolbox.sites}
    weights = [p for site in sizes for p in model.toolbox.parameters_of(site).values()]
    total = torch.zeros(len(sizes), device=DEVICE)
    for image, label in zip(images, labels, strict=True):
        with mixed_precision(DEVICE):
            loss = model.loss(image[None], label[None]).sum()
        gradients = iter(torch.autograd.grad(loss, weights))
        norms = [torch.nn.utils.get_total_norm(list(islice(gradients, size))) for size in sizes.values()]
        total += torch.stack(norms).square()
    return dict(zip(sizes, (total / len(images)).tolist(), strict=True))


@needs_gpu
@pytest.mark.gpu
def bench_fisher_pass_on_the_gpu(benchmark):
    model = perturb(make_segmenter(SIZE)).to(DEVICE)
    model.head.requires_grad_(False)
    model.toolbox.apply(GatePlan(model.toolbox.sites))
    batch = make_batch(SIZE, SAMPLES, DEVICE)
    assert fisher_pass(model, *batch) == pytest.approx(loop_over_samples(model, *batch), rel=TOLERANCE)
    ways = {
        "candidate": lambda: fisher_pass(model, *batch),
        "plain forward + backward": lambda: plain_pass(model, *batch),
        "loop over samples": lambda: loop_over_samples(model, *batch),
    }
    gpu_side_by_side(benchmark, ways, targets=TARGETS, rounds=ROUNDS, warmup=2)

    peaks = {name: peak_bytes(ways[name], DEVICE) for name in ("candidate", "plain forward + backward")}
    weights = sum(p.nbytes for p in model.toolbox.parameters())
    extra = peaks["candidate"] - peaks["plain forward + backward"]
    for name, peak in peaks.items():
        note(f"{benchmark.name} peak memory", name, f"{peak / 1e6:.1f} MB")
    note(
        f"{benchmark.name} peak memory beyond the plain pass",
        "module weights", f"{weights / 1e6:.1f} MB", f"{extra / weights:.2f}", "<= 2",
    )  # fmt: skip
