"""Frequency adapters to measure; a module of its own, so that a fresh process can import it."""

from __future__ import annotations

from functools import partial

import torch
from gpu_side_by_side import forward_backward, with_gradient
from side_by_side import seconds_of

from cegate.kernels.frequency_adapter import frequency_adapter, frequency_adapter_fft

CHANNELS, WIDTH = 1024, 32


def make_layer(batch, side, *, dtype=torch.float32, device="cpu"):
    """x [B, side^2, C] and the seven weights, all wanting gradients."""
    shapes = [(batch, side * side, CHANNELS), (3, WIDTH, CHANNELS), (3, WIDTH), (3, CHANNELS, WIDTH), (3, CHANNELS)]
    shapes += [(3, CHANNELS), (3,), ()]
    return [torch.randn(shape, device=device).mul_(0.1).to(dtype).requires_grad_() for shape in shapes]


def on_grid(side, function=frequency_adapter, **options):
    return lambda x, *weights: function(x, (side, side), *weights, **options)


def check(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


def measure_on_cpu(rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each way."""
    tensors = with_gradient(partial(make_layer, 4, 32))()
    ways = {
        "candidate": on_grid(32),
        "torch backend": on_grid(32, backend="torch"),
        "fft": on_grid(32, frequency_adapter_fft),
    }
    runs = {name: partial(forward_backward(way), *tensors) for name, way in ways.items()}
    for name in ("candidate", "torch backend"):
        check(runs[name](), runs["fft"](), 1e-5)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run)[0])
    return times
