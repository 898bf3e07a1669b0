"""Fisher mass of one projection beside the loop over samples and beside all per-sample gradients at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_side_by_side import gpu_side_by_side, needs_gpu, rotate
from side_by_side import side_by_side

from cegate.kernels.sum_squared_gradients import sum_squared_gradients

SAMPLES, TOKENS, WIDTH, RANK = 16, 1025, 1024, 64
DEVICE = "cuda"


def make_pair(**options):
    """Inputs of a down projection and the gradients of its output, for a ViT-L at 512 px."""
    return [torch.randn(SAMPLES, TOKENS, width, **options) for width in (WIDTH, RANK)]


def all_at_once(inputs, grads):
    """Every per-sample gradient in memory, then squared and summed (as vmap and the per-sample libraries do)."""
    return torch.einsum("bto,bti->boi", grads, inputs).float().square().sum(0)


@pytest.mark.parametrize("reduce", [False, True], ids=["diagonal", "sum"])
def bench_sum_squared_gradients_on_the_cpu(benchmark, reduce):
    inputs, grads = make_pair()
    rivals = {"all at once": lambda: all_at_once(inputs, grads).sum() if reduce else all_at_once(inputs, grads)}
    ours = partial(sum_squared_gradients, inputs, grads, reduce=reduce, backend="torch")
    torch.testing.assert_close(
        side_by_side(benchmark, ours, rivals, rounds=5), rivals["all at once"](), rtol=1e-3, atol=1
    )


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("reduce", [False, True], ids=["diagonal", "sum"])
def bench_sum_squared_gradients(benchmark, reduce):
    sets = rotate(partial(make_pair, device=DEVICE, dtype=torch.bfloat16))
    ways = {name: partial(sum_squared_gradients, reduce=reduce, backend=name) for name in ("triton", "torch")}
    ways["all at once"] = lambda a, g: all_at_once(a, g).sum() if reduce else all_at_once(a, g)
    exact = sum_squared_gradients(*(tensor.double() for tensor in sets[0]), reduce=reduce)
    torch.testing.assert_close(ways["triton"](*sets[0]).double(), exact, rtol=1e-3, atol=1)
    moved = sum(tensor.nbytes for tensor in sets[0]) + (4 if reduce else 4 * WIDTH * RANK)
    gpu_side_by_side(benchmark, ways, sets, moved_bytes=moved, flops=2 * SAMPLES * TOKENS * WIDTH * RANK)
