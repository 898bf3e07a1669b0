"""Low-rank maps beside eager modules: the bottleneck adapter, and LoRA as Hugging Face PEFT runs it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_side_by_side import forward_backward, gpu_side_by_side, needs_gpu, rotate
from side_by_side import side_by_side
from torch.nn.functional import gelu, linear

from cegate.kernels.low_rank import low_rank, low_rank_qv_

CHANNELS, RANK = 1024, 64


def make_adapter(batch, tokens, **options):
    """x and base (want gradients, as inside a network), down, up and their biases."""
    shapes = [(batch, tokens, CHANNELS)] * 2 + [(RANK, CHANNELS), (CHANNELS, RANK), (RANK,), (CHANNELS,)]
    return [torch.randn(shape, **options).mul_(0.1).requires_grad_() for shape in shapes]


def fused_adapter(x, base, down, up, down_bias, up_bias, backend="auto"):
    biases = {"down_bias": down_bias, "up_bias": up_bias}
    return low_rank(x, down, up, base=base, **biases, activation="gelu", scale=0.1, backend=backend)


def eager_adapter(x, base, down, up, down_bias, up_bias):
    return base + 0.1 * linear(gelu(linear(x, down, down_bias)), up, up_bias)


def make_lora(batch, tokens, **options):
    """x and the frozen fused projection's output, then the maps of q and v."""
    shapes = [(batch, tokens, CHANNELS), (batch, tokens, 3 * CHANNELS)] + [(RANK, CHANNELS), (CHANNELS, RANK)] * 2
    return [torch.randn(shape, **options).mul_(0.1).requires_grad_() for shape in shapes]


def fused_lora(x, qkv, *maps, backend="auto"):
    return low_rank_qv_(qkv * 1, x, *maps, backend=backend)


def eager_lora(x, qkv, down_q, up_q, down_v, up_v):
    """PEFT's arithmetic for LoRA on q and v: two linear layers each, scaled and added."""
    q, k, v = (qkv * 1).chunk(3, dim=-1)
    return torch.cat([q + linear(linear(x, down_q), up_q), k, v + linear(linear(x, down_v), up_v)], dim=-1)


CASES = {"adapter": (make_adapter, fused_adapter, eager_adapter), "lora": (make_lora, fused_lora, eager_lora)}


def check(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("case", CASES)
def bench_low_rank_on_the_cpu(benchmark, case):
    make, fused, eager = CASES[case]
    tensors = make(2, 1025)
    eagerly = partial(forward_backward(eager), *tensors)
    ours = partial(forward_backward(partial(fused, backend="torch")), *tensors)
    check(side_by_side(benchmark, ours, {"eager": eagerly}, rounds=5, target={"eager": "<= 1"}), eagerly(), 1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("size", [(4, 1024), (16, 1024), (16, 4096)], ids=str)
@pytest.mark.parametrize("case", CASES)
def bench_low_rank(benchmark, case, size):
    make, fused, eager = CASES[case]
    inputs = rotate(partial(make, *size, device="cuda", dtype=torch.bfloat16))
    ways = {"triton": partial(fused, backend="triton"), "eager": eager}
    ways = {name: forward_backward(way) for name, way in ways.items()}
    check(ways["triton"](*inputs[0]), ways["eager"](*inputs[0]), 0.05)
    tokens, wide = size[0] * size[1], 1 if case == "adapter" else 2
    gpu_side_by_side(
        benchmark, ways, inputs, moved_bytes=2 * tokens * CHANNELS * (5 + 2 * wide),
        flops=3 * wide * 4 * tokens * CHANNELS * RANK, targets={"eager": "<= 1; <= 0.77 at 4 x 1024"},
    )  # fmt: skip
