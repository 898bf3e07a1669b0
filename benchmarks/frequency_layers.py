"""Frequency adapters to measure; a module of its own, so that a fresh process can import it."""

from __future__ import annotations

from functools import partial

import torch
from gpu_side_by_side import forward_backward, with_gradient
from side_by_side import seconds_of
from torch.nn.functional import linear

from cegate.kernels.frequency_adapter import frequency_adapter, frequency_adapter_fft
from cegate.kernels.low_pass import box_filter, box_half_width

CHANNELS, WIDTH = 1024, 32


def make_layer(batch, side, *, dtype=torch.float32, device="cpu"):
    """x [B, side^2, C] and the seven weights, all wanting gradients."""
    shapes = [(batch, side * side, CHANNELS), (3, WIDTH, CHANNELS), (3, WIDTH), (3, CHANNELS, WIDTH), (3, CHANNELS)]
    shapes += [(3, CHANNELS), (3,), ()]
    return [torch.randn(shape, device=device).mul_(0.1).to(dtype).requires_grad_() for shape in shapes]


def on_grid(side, function=frequency_adapter, **options):
    return lambda x, *weights: function(x, (side, side), *weights, **options)


def project_first(side, device, cutoff=0.3):
    """The same order of products in plain PyTorch without the coupled corner, for a compiler to fuse."""
    filters = box_filter((side, side), box_half_width((side, side), cutoff), "official", torch.float32, device)
    rows, columns = ((basis.mT * weights) @ basis for basis, weights in zip(filters[:2], filters[2:4], strict=True))

    def run(x, down, down_bias, up, up_bias, router, router_bias, scale):
        hidden = linear(x, torch.cat([down.flatten(0, 1), router]))
        direct, second, third, logits = hidden.split([WIDTH, WIDTH, WIDTH, 3], dim=-1)
        both = torch.cat([second, third], dim=-1).unflatten(1, (side, side))
        low = torch.einsum("hi,bijc,wj->bhwc", rows.to(x), both, columns.to(x)).flatten(1, 2)
        bands = torch.cat([direct, low[..., :WIDTH], third - low[..., WIDTH:]], dim=-1) + down_bias.flatten()
        gates = torch.softmax(logits + router_bias, dim=-1)
        mixed = (bands.relu().unflatten(-1, (3, WIDTH)) * gates[..., None]).flatten(-2)
        return x + scale * (mixed @ up.mT.flatten(0, 1) + gates @ up_bias)

    return run


def check(ours, theirs, tolerance):
    """Relative errors in the 2-norm.

    Not in the largest entry: in bfloat16 a hidden value near zero may fall on the other side of a ReLU, and the
    gradient of x at that token is then off by a whole unit's share. Of 4,096 tokens 175 do (against float64); they are
    off by up to 8 % of the largest entry, the others by 1 %, all together by 0.3 % of the norm.
    """
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.float() - other.float()).norm() <= tolerance * other.float().norm()


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
