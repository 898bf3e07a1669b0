"""One backbone, several adapters: a mixed batch beside a loop over its samples and beside a batch of one adapter."""

from __future__ import annotations

import random

import pytest
import torch
from memory import peak_bytes
from models import SIZES, make_batch, make_segmenter
from side_by_side import note, side_by_side
from torch import Tensor

from cegate.adapters import Adapter
from cegate.backbone.vit import weight_hash
from cegate.gate import GatePlan
from cegate.segmenter import Segmenter

K = 18
DOMAINS = ("arid", "boreal", "monsoon", "temperate")
ARRIVING = ("arid", "boreal", "arid", "monsoon", "temperate", "monsoon", "boreal", "temperate")
ROUNDS = {"vit_t": 9, "vit_l": 3}
TARGET = {"loop over samples": "<= 0.33", "uniform batch": "<= 1.1"}


def random_sites(segmenter: Segmenter, draw: random.Random) -> GatePlan:
    return GatePlan(draw.sample(segmenter.toolbox.sites, K))


def random_adapter(segmenter: Segmenter, backbone_sha256: str, draw: random.Random) -> Adapter:
    """An adapter of K sites with random weights."""
    plan = random_sites(segmenter, draw)
    shapes = {
        f"toolbox.{site}.{key}": weight
        for site in plan.on
        for key, weight in segmenter.toolbox.parameters_of(site).items()
    } | {f"head.{key}": weight for key, weight in segmenter.head.state_dict().items()}
    weights = {key: weight.detach() + 0.02 * torch.randn(weight.shape) for key, weight in shapes.items()}
    given = (
        segmenter.config,
        plan,
        backbone_sha256,
        segmenter.recipe.mean,
        segmenter.recipe.std,
        None,
        "random weights",
        weights,
    )
    return Adapter(*given)


def loop(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Every sample in a call of its own."""
    rows = [segmenter(image[None], adapter=name) for image, name in zip(images, ARRIVING, strict=True)]
    return torch.cat(rows)


@pytest.mark.parametrize("size", SIZES)
def bench_eight_samples_with_four_adapters(benchmark, size):
    segmenter, draw = make_segmenter(size).eval(), random.Random(0)
    digest = weight_hash(segmenter.vit)
    for name in DOMAINS:
        segmenter.add_adapter(name, random_adapter(segmenter, digest, draw))
    images, _ = make_batch(size, len(ARRIVING))
    with torch.no_grad():
        ways = {
            "loop over samples": lambda: loop(segmenter, images),
            "one call an adapter": lambda: [
                segmenter(images[[b for b, other in enumerate(ARRIVING) if other == name]], adapter=name)
                for name in DOMAINS
            ],
            "uniform batch": lambda: segmenter(images, adapter=DOMAINS[0]),
        }
        together = lambda: segmenter(images, adapter=ARRIVING)  # noqa: E731
        logits = side_by_side(benchmark, together, ways, rounds=ROUNDS[size], target=TARGET)
        torch.testing.assert_close(logits, loop(segmenter, images), rtol=1e-4, atol=1e-4)
        note_peaks(benchmark, peak_bytes(together), peak_bytes(ways["uniform batch"]))


@pytest.mark.parametrize("size", SIZES)
def bench_eight_samples_with_gates_of_their_own(benchmark, size):
    segmenter, draw = make_segmenter(size).eval(), random.Random(0)
    images, _ = make_batch(size, len(ARRIVING))
    plans = [random_sites(segmenter, draw) for _ in DOMAINS]
    gates = torch.tensor([plans[DOMAINS.index(name)].matrix(segmenter.toolbox.depth) for name in ARRIVING])

    def alone() -> Tensor:
        rows = [segmenter(image[None], gates=own) for image, own in zip(images, gates, strict=True)]
        return torch.cat(rows)

    with torch.no_grad():
        for parameter in segmenter.toolbox.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        ways = {"loop over samples": alone, "uniform batch": lambda: segmenter(images, gates=gates[0])}
        together = lambda: segmenter(images, gates=gates)  # noqa: E731
        logits = side_by_side(benchmark, together, ways, rounds=ROUNDS[size], target=TARGET)
        torch.testing.assert_close(logits, alone(), rtol=1e-4, atol=1e-4)
        note_peaks(benchmark, peak_bytes(together), peak_bytes(ways["uniform batch"]))


def note_peaks(benchmark, ours: int, uniform: int) -> None:
    """A row of the peak memory of the mixed batch beside that of a batch of one kind."""
    note(f"{benchmark.name} peak memory", "uniform batch", f"{ours / 1e6:.1f} MB", f"{ours / uniform:.3f}")
