"""The frequency adapter beside the FFT formulation of its paper and beside project-first PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from frequency_layers import CHANNELS, WIDTH, check, make_layer, measure_on_cpu, on_grid, project_first
from gpu_side_by_side import forward_backward, gpu_side_by_side, needs_gpu, rotate, with_gradient
from side_by_side import in_own_process

from cegate.kernels.frequency_adapter import frequency_adapter_fft

DEVICE = "cuda"


def bench_frequency_adapter_on_the_cpu(benchmark):
    """(B, N, C, d) = (4, 1024, 1024, 32), float32, forward and backward.

    In a process of its own: the FFT form allocates some 400 MB anew in every pass, and what that costs (half of its
    time are page faults) depends on what the process freed before. Ours makes no fault.
    """
    in_own_process(benchmark, measure_on_cpu, target={"fft": "<= 0.167"})


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("batch", [4, 16])
def bench_frequency_adapter_forward_backward(benchmark, batch, side):
    inputs = rotate(with_gradient(partial(make_layer, batch, side, dtype=torch.bfloat16, device=DEVICE)))
    functions = {
        "triton": on_grid(side, backend="triton"),
        "fft": lambda x, *weights: on_grid(side, frequency_adapter_fft)(x.float(), *(w.float() for w in weights)),
        "project-first, torch.compile": torch.compile(project_first(side, torch.device(DEVICE))),
    }
    ways = {name: forward_backward(function) for name, function in functions.items()}
    check(ways["triton"](*inputs[0]), ways["fft"](*inputs[0]), 0.02)
    tokens = batch * side * side
    gpu_side_by_side(
        benchmark, ways, inputs, moved_bytes=5 * 2 * tokens * CHANNELS,  # x, y, x again, dy, dx
        flops=3 * 2 * tokens * CHANNELS * (6 * WIDTH + 3),
        targets={"fft": "<= 0.1", "project-first, torch.compile": "<= 0.5"},
    )  # fmt: skip


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("batch", [4, 16])
def bench_frequency_adapter_forward(benchmark, batch, side):
    inputs = rotate(partial(make_layer, batch, side, dtype=torch.bfloat16, device=DEVICE))
    ways = {"triton": torch.no_grad()(on_grid(side, backend="triton")), "copy": lambda x, *_: x.detach().clone()}
    exact = on_grid(side, frequency_adapter_fft)(*(tensor.detach().float() for tensor in inputs[0]))
    check([ways["triton"](*inputs[0])], [exact], 0.02)
    tokens = batch * side * side
    gpu_side_by_side(
        benchmark, ways, inputs, moved_bytes=2 * 2 * tokens * CHANNELS,
        flops=2 * tokens * CHANNELS * (6 * WIDTH + 3), targets={"copy": "<= 1.6 at the largest size"},
    )  # fmt: skip
