"""A whole step with the Mask2Former head beside the same weights run by the library's modules and loss.

Times are of the one thread that computes, since a step's wall time on a shared processor says little. Operator calls
(without those that only look at a tensor differently) stand for what a GPU is asked to launch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from memory import peak_bytes
from models import SIZES, make_batch, make_segmenter
from operator_calls import OperatorCalls
from side_by_side import compare, note
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from cegate.heads import mask2former

ROUNDS, SIZE = 3, SIZES["vit_t"]
TERMS = {"cross_entropy": 2, "mask": 5, "dice": 5}


class OfTheLibrary(nn.Module):
    """The head of ``model`` as transformers computes it; its points lie anywhere, and no pixel is ignored."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.decoder = model, model.head.decoder
        self.criterion = Mask2FormerLoss(self.decoder.config, {})

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch."""
        pixels = self.decoder.pixel_decoder(mask2former._pyramid(self.model.encode(images).maps))
        found = self.decoder.transformer(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.decoder.class_predictor(x.transpose(0, 1)) for x in found.intermediate_hidden_states]
        layers = [
            {"class_queries_logits": c, "masks_queries_logits": m}
            for c, m in zip(classes, found.masks_queries_logits, strict=True)
        ]
        present = [label.unique() for label in labels]
        truth = [(label == own[:, None, None]).float() for label, own in zip(labels, present, strict=True)]
        last = layers.pop()
        parts = self.criterion(last["masks_queries_logits"], last["class_queries_logits"], truth, present, layers)
        return sum(weight * loss for name, loss in parts.items() for term, weight in TERMS.items() if term in name)


def make_step(build: Callable[[nn.Module], nn.Module], batch: int) -> Callable[[], Tensor]:
    """Forward, loss and backward of a fresh model, the same for every way; AdamW costs them all the same."""
    torch.manual_seed(0)
    trained = build(make_segmenter(SIZE, "mask2former").train())
    images, labels = make_batch(SIZE, batch)

    def step() -> Tensor:
        trained.zero_grad(set_to_none=True)
        loss = trained.loss(images, labels).mean()
        loss.backward()
        return loss.detach()

    return step


def thread_seconds(step: Callable[[], Tensor]) -> float:
    began = time.thread_time()
    step()
    return time.thread_time() - began


@pytest.mark.parametrize("batch", [1, 4])
def bench_mask2former_step(benchmark, monkeypatch, batch):
    ways = {"cegate": make_step(lambda model: model, batch), "transformers": make_step(OfTheLibrary, batch)}
    first = [step().item() for step in ways.values()]
    assert first[0] == pytest.approx(first[1], rel=0.02)  # points differ
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, step in ways.items():
            times[name].append(thread_seconds(step))
    benchmark.pedantic(ways["cegate"], rounds=1)
    compare(benchmark, statistics.median(times.pop("cegate")), times, {})
    for name, step in ways.items():
        note(benchmark.name, f"{name}: peak memory", f"{peak_bytes(step) / 1e6:.0f} MB")
    monkeypatch.setattr(mask2former, "_AT_ONCE", {})  # as on a GPU
    for name, step in ways.items():
        with OperatorCalls() as calls:
            step()
        note(benchmark.name, f"{name}: operator calls", str(calls.found.total()))
