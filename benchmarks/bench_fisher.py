"""One Fisher pass over M samples beside a plain forward and backward, and beside the loop over samples."""

from __future__ import annotations

import pytest
from memory import peak_bytes
from models import Probe, make_batch, make_segmenter, perturb
from side_by_side import note, side_by_side

from cegate.fisher import measure_fisher
from cegate.gate import GatePlan

SAMPLES = {"vit_t": 8, "vit_l": 2}


def plain_step(model, images, labels):
    """Forward and backward of all samples, every site on and learning."""
    model.loss(images, labels).sum().backward()


def loop_over_samples(model, images, labels):
    """The definition: one backward pass per sample."""
    scores = dict.fromkeys(model.toolbox.sites, 0.0)
    for image, label in zip(images, labels, strict=True):
        model.toolbox.zero_grad()
        model.loss(image[None], label[None]).sum().backward()
        for site in scores:
            scores[site] += sum(float(p.grad.square().sum()) for p in model.toolbox.parameters_of(site).values())
    return {site: score / len(images) for site, score in scores.items()}


@pytest.mark.parametrize("size", SAMPLES)
def bench_fisher_pass(benchmark, size):
    model = perturb(make_segmenter(size))
    images, labels = make_batch(size, SAMPLES[size])
    model.toolbox.apply(GatePlan(model.toolbox.sites))
    probe = [Probe(images, labels)]

    scores = side_by_side(
        benchmark,
        lambda: measure_fisher(model, model.toolbox, probe),
        {
            "plain forward + backward": lambda: plain_step(model, images, labels),
            "loop over samples": lambda: loop_over_samples(model, images, labels),
        },
        rounds=7 if size == "vit_t" else 3,
        target={"plain forward + backward": "<= 1.15", "loop over samples": "< 1"},
    )
    assert scores == pytest.approx(loop_over_samples(model, images, labels), rel=1e-3)

    model.toolbox.zero_grad()
    extra = peak_bytes(lambda: measure_fisher(model, model.toolbox, probe)) - peak_bytes(
        lambda: plain_step(model, images, labels)
    )
    weights = sum(p.numel() * p.element_size() for p in model.toolbox.parameters())
    note(
        f"{benchmark.name} peak memory beyond the plain pass",
        "module weights",
        f"{weights / 1e6:.1f} MB",
        f"{extra / weights:.2f}",
        "<= 2",
    )
