"""The low-pass by narrow projections beside its definition by FFT, at full width."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_side_by_side import gpu_side_by_side, needs_gpu, rotate
from side_by_side import side_by_side

from cegate.kernels.low_pass import low_pass, low_pass_fft

DEVICE = "cuda"


@pytest.mark.parametrize("channels", [64, 1024])
def bench_low_pass_on_the_cpu(benchmark, channels):
    x = torch.randn(4, 1024, channels)
    fft = partial(low_pass_fft, x, (32, 32))
    result = side_by_side(benchmark, partial(low_pass, x, (32, 32), backend="torch"), {"fft": fft})
    torch.testing.assert_close(result, fft(), atol=1e-5, rtol=0)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("channels", [64, 1024])
def bench_low_pass(benchmark, channels, side):
    batch, grid = 8, (side, side)
    inputs = rotate(lambda: [torch.randn(batch, side * side, channels, device=DEVICE, dtype=torch.bfloat16)])
    ways = {
        "triton": lambda x: low_pass(x, grid, backend="triton"),
        "fft": lambda x: low_pass_fft(x.float(), grid),
        "torch": lambda x: low_pass(x, grid, backend="torch"),
        "copy": torch.clone,
    }
    torch.testing.assert_close(ways["triton"](*inputs[0]).float(), ways["fft"](*inputs[0]), atol=0.02, rtol=0.01)
    kept = 2 * int(side * 0.3 // 2) + 1
    flops = 2 * batch * channels * kept * (2 * side * side + side * side)
    gpu_side_by_side(benchmark, ways, inputs, moved_bytes=2 * inputs[0][0].nbytes, flops=flops)
